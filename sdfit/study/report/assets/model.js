// The arithmetic of the page: f, its intervals, verdicts and advice, as sdfit/equation and sdfit/predict have them.
//
// Nothing is stated here that Python states: terms, stages, regimes, choices and costs come in as `facts`, a fitted model
// as `artifact`, both as Python wrote them. Operations stand in the order in which Python does them, so the numbers are
// the same doubles but for the last digits of sums of products, which NumPy's linear algebra may take in another order:
// a millionth of a byte. A test holds both to it.
"use strict";

const sdfit = (() => {
  const MANY = Infinity;

  // -- numbers --

  /** Round as Python does: halves to the even neighbour. */
  function round(value) {
    const low = Math.floor(value);
    if (value - low !== 0.5) return Math.round(value);
    return low % 2 === 0 ? low : low + 1;
  }

  /** How many of some ascending values are <= x, and how many are < x. */
  const bisectRight = (values, x) => { let low = 0, high = values.length; while (low < high) { const mid = (low + high) >> 1; if (x < values[mid]) high = mid; else low = mid + 1; } return low; };
  const bisectLeft = (values, x) => { let low = 0, high = values.length; while (low < high) { const mid = (low + high) >> 1; if (values[mid] < x) low = mid + 1; else high = mid; } return low; };

  /** An amount of bytes in words, as `sdfit.units.format_bytes`. */
  function formatBytes(bytes) {
    for (const [size, name, digits] of [[2 ** 30, "GiB", 3], [2 ** 20, "MiB", 1], [2 ** 10, "KiB", 1]]) {
      if (Math.abs(bytes) >= size) return `${grouped(fixed(bytes / size, digits))} ${name}`;
    }
    return `${fixed(bytes, 0)} B`;
  }

  /** Decimals as Python writes them: halves, which are odd multiples of 2^-(digits + 1), to the even neighbour. */
  function fixed(value, digits) {
    const half = Math.abs(value * 2 ** (digits + 1)) % 2 === 1;
    return half ? (round(value * 10 ** digits) / 10 ** digits).toFixed(digits) : value.toFixed(digits);
  }
  function grouped(digits) {
    const [whole, rest] = digits.split(".");
    return whole.replace(/\B(?=(\d{3})+$)/g, ",") + (rest === undefined ? "" : `.${rest}`);
  }

  // -- what was asked for --

  class Unknown extends Error {}   // a variant that the model does not know
  class Invalid extends Error {}   // a workload that cannot be

  /** The values of the discrete fields, in Python's order. */
  const variantOf = (facts, workload) => Object.keys(facts.choices).map((name) => workload[name]);

  /** Refuse what `sdfit.workload.Workload` refuses. */
  function check(facts, workload) {
    for (const [name, [low, high]] of Object.entries(facts.limits)) {
      const value = workload[name];
      if (!Number.isInteger(value)) throw new Invalid(`${name} must be a whole number from ${low} to ${high}`);
      if (value < low || value > high) throw new Invalid(`${name} is ${value}; it must be from ${low} to ${high}`);
    }
    if (!(workload.guidance_scale >= 0 && workload.guidance_scale < Infinity)) throw new Invalid("guidance_scale must be a number >= 0");
    for (const [name, allowed] of Object.entries(facts.choices)) {
      if (!allowed.includes(workload[name])) throw new Invalid(`${name} must be one of ${allowed.join(", ")}`);
    }
  }

  /** Pixels along one side that all VAE tiles cover together (`sdfit.equation.sizes.tiled_pixels`). */
  function tiledPixels(side, { pixels, stride }) {
    const count = Math.floor((side + stride - 1) / stride);
    const whole = side >= pixels ? Math.floor((side - pixels) / stride) + 1 : 0;
    const cutOff = count - whole;
    const starts = (count * (count - 1) - whole * (whole - 1)) / 2 * stride;
    return pixels * whole + side * cutOff - starts;
  }

  /** The letters B n A L m P D of a workload (`sdfit.workload.effective`, `sdfit.equation.sizes.Sizes`). */
  function sizesOf(facts, w) {
    const height = Math.floor(w.height / facts.vae_scale) * facts.vae_scale;
    const width = Math.floor(w.width / facts.vae_scale) * facts.vae_scale;
    const B = w.batch_size, n = w.guidance_scale > 1 ? 2 * B : B;
    const A = height * width, L = Math.max(w.prompt_length, facts.chunk_tokens);
    const m = w.vae_slicing ? 1 : B;
    let P = A, covered = A;
    const edge = facts.tile.pixels;
    if (w.vae_tiling && (height > edge || width > edge)) {
      P = Math.min(height, edge) * Math.min(width, edge);
      covered = tiledPixels(height, facts.tile) * tiledPixels(width, facts.tile);
    }
    return { B, n, A, L, m, P, D: (B - m) * A + m * (covered - P), height, width };
  }

  /** What each term multiplies, in the order of `facts.terms` (`sdfit.equation.terms.products`). */
  function products({ B, n, A, L, m, P, D }) {
    const mP = m * P, nA = n * A, nL = n * L;
    return [1, m, B, n, mP, mP * P, nA, nA * A, A * A, nL * A, nL, B * A, D];
  }

  function dot(row, every) {
    let sum = 0;
    for (let t = 0; t < row.length; t++) sum += row[t] * every[t];
    return sum;
  }

  /** The regime of a stage, an index into `facts.regimes`. */
  function regimeOf(facts, stage, sizes) {
    const images = sizes[stage.batch];
    const elements = stage.widest_channels ? images * sizes.P * stage.widest_channels : 0;
    return facts.regimes.findIndex(({ images: [fewest, most], elements: [start, end] }) =>
      fewest <= images && images <= (most ?? MANY) && start <= elements && elements < (end ?? MANY));
  }

  // -- conformal scores (sdfit/predict/conformal.py) --

  function keptRanks(facts, count) {
    const half = Math.floor((count + 1) / 2), below = [];
    for (let rank = 1; rank <= Math.min(facts.kept, half); rank++) below.push(rank);
    while (below.length && below[below.length - 1] < half) {
      const last = below[below.length - 1];
      below.push(Math.min(last + Math.max(Math.floor(last / 2), 1), half));
    }
    const every = new Set(below);
    for (const rank of below) every.add(count + 1 - rank);
    return [...every].sort((a, b) => a - b);
  }

  class Scores {
    constructor(facts, [size, values]) {
      this.size = size; this.values = values; this.ranks = keptRanks(facts, size);
    }
    quantile(level) {
      const rank = Math.max(Math.ceil((this.size + 1) * level - 1e-9), 1);
      return rank <= this.size ? this.values[bisectLeft(this.ranks, rank)] : Infinity;
    }
    lowerQuantile(level) {
      const rank = Math.min(Math.floor((this.size + 1) * (1 - level) + 1e-9), this.size);
      return rank >= 1 ? this.values[bisectRight(this.ranks, rank) - 1] : -Infinity;
    }
    shareBelow(score) {
      const kept = bisectRight(this.values, score);
      return (kept ? this.ranks[kept - 1] : 0) / (this.size + 1);
    }
  }

  // -- one variant of a model (sdfit/predict/variant.py) --

  class Variant {
    constructor(model, key) {
      const { facts, artifact } = model;
      this.model = model; this.facts = facts;
      this.values = Object.fromEntries(Object.keys(facts.choices).map((name, i) => [name, key[i]]));
      const v = this.values;
      this.stages = facts.stages.filter(({ name }) =>
        !(name === "safety_checker" && !v.safety_checker) && !(name.endsWith("_mid") && v.vae === "tiny") &&
        !(name.endsWith("_deep") && !(v.offload in this.facts.streamed)));
      this.weights = this.stages.map((stage) => this.resident(stage));
      const found = this.stages.map((stage) => artifact.stages[this.stageKey(stage)]);
      this.regimes = found.map((stage) => stage.regimes);
      this.terms = found.map((stage) => stage.terms);
      this.rows = found.map((stage, i) => this.aligned(stage, this.weights[i]));
      this.beside = this.stages.map((stage, i) => {
        const other = artifact.stages[this.besideKey(stage)];
        return other && { regimes: other.regimes, rows: this.aligned(other, this.weights[i]) };
      });
      this.domain = Object.keys(found[0].domain).map((column) => [column,
        Math.max(...found.map((stage) => stage.domain[column][0])), Math.min(...found.map((stage) => stage.domain[column][1]))]);
      this.groups = new Map(); this.quantiles = new Map(); this.packings = new Map();
    }

    /** The coefficients that a stage uses (`sdfit.equation.stages.stage_key`). */
    stageKey(stage) {
      const values = { ...this.values };
      if (stage.name.startsWith("vae") && values.attention in this.facts.slices) values.attention = "sdpa";
      const key = [stage.name, ...stage.fields.map((field) => values[field])];
      if (values.offload in this.facts.streamed) key.push(this.facts.streamed[values.offload]);
      const usual = this.facts.choices.execution[0];
      if (values.execution !== usual && (stage.name.startsWith("unet") || values.execution === "tf32")) key.push(values.execution);
      return key.join("|");
    }

    /** The coefficients that may stand beside a stage's, whichever gives more (`sdfit.equation.stages.beside`). */
    besideKey(stage) {
      const streamed = this.values.offload in this.facts.streamed;
      if (stage.name !== "unet" || streamed) return "";
      return this.stageKey({ ...stage, name: "unet_deep" }).replace(`|${this.values.attention}`, `|${this.facts.choices.attention[0]}`);
    }

    /** A stage's sets of coefficients in the columns of `products`, the weights added to the constant. */
    aligned(stage, weights) {
      const { terms } = this.facts;
      return stage.coef.map((coef) => {
        const row = new Array(terms.length).fill(0);
        stage.terms.forEach((term, t) => { row[terms.indexOf(term)] = coef[t]; });
        row[terms.indexOf("1")] += weights;
        return row;
      });
    }

    /** Bytes of weights in a stage; refuses what was never swept. */
    resident(stage) {
      const { facts, artifact } = this.model, { vae, safety_checker: checker, offload, dtype } = this.values;
      const weights = this.model.weightsOf(this.values.execution === "int8" ? `${dtype}/int8` : dtype);
      const streamed = facts.resident_when_streamed[offload];
      const parts = (streamed ?? (offload === "none" ? facts.components : facts.resident_when_offloaded[stage.name]))
        .filter((part) => part !== "safety_checker" || checker);
      const all = `all/${vae}/${checker ? "checked" : "unchecked"}`;
      let labels = parts.map((part) => (part === "vae" ? `vae/${vae}` : part));
      if (offload === "none" && all in weights) labels = [all];
      if (vae === "tiny" && offload === "group_block") throw new Unknown(`offload='group_block' with vae='tiny' ${facts.tiny_blocks}`);
      if (vae === "tiny" && this.values.vae_tiling && dtype !== "float32") throw new Unknown(`vae_tiling with vae='tiny' in ${dtype} ${facts.tiny_tiles}`);
      const found = artifact.stages[this.stageKey(stage)];
      if (!found || labels.some((label) => !(label in weights))) {
        throw new Unknown(`the model has no coefficients for this combination: its ${stage.name} was never swept`);
      }
      if (stage.name.startsWith("vae")) {
        const wanted = this.values.vae_tiling ? ["D"] : this.values.vae_slicing ? ["D", "B·A"] : [];
        if (wanted.length && wanted.every((term) => found.unidentified.includes(term))) {
          throw new Unknown(`the model never saw slicing or tiling of the '${vae}' VAE in ${dtype}`);
        }
      }
      return labels.reduce((sum, label) => sum + weights[label], 0);
    }

    /** The coefficients of a stage that count at some sizes. */
    rowOf(i, sizes, every) {
      const regime = regimeOf(this.facts, this.stages[i], sizes), row = this.rows[i][this.regimes[i][regime]];
      if (!this.beside[i]) return row;
      const other = this.beside[i].rows[this.beside[i].regimes[regime]];
      return dot(other, every) > dot(row, every) ? other : row;
    }

    /** The peak of each stage [bytes], resident weights included. */
    stagePeaks(sizes, every) { return this.stages.map((_, i) => dot(this.rowOf(i, sizes, every), every)); }

    /** Where a run stands (`sdfit.equation.metrics.Place`): what it has in common with others that pack alike. */
    place(top, sizes) {
      const { facts, values } = this;
      const regime = regimeOf(facts, facts.stages.find((stage) => stage.name === "vae_decoder_blocks"), sizes);
      const split = facts.regimes[regime].elements[0] > 0;
      const piece = facts.pieces[this.stages[top].name];
      const attention = values.attention + (values.offload in facts.streamed ? `/${values.offload}` : "");
      return {
        element_bytes: facts.dtype_bytes[values.dtype], vae: values.vae,
        attention, scoring: attention in facts.slices ? "sliced" : attention,
        offload: values.offload, sliced: sizes.m < sizes.B, tiled: sizes.P < sizes.A, guided: sizes.n > sizes.B,
        three: sizes.m === 3 && split, regime, piece, split, tiles: sizes.P < sizes.A && piece.startsWith("vae"),
      };
    }

    /** One of the metrics beside allocated memory [bytes]. */
    metric(metric, told) {
      const { facts, model } = this, { sizes, every, peaks, top, place } = told;
      if (metric === "allocated") return peaks[top];
      if (metric === "device" && this.basis(metric) === "reserved") return this.metric("reserved", told) + model.contextBytes;
      const groups = model.artifact.metrics[metric];
      if (!groups) throw new Unknown(`the model has no '${metric}'`);
      const known = `${metric} ${told.code}`;
      let group = this.groups.get(known);
      if (!group) {
        group = groups[namesOf(place, facts.widening).find((name) => name in groups)];
        this.groups.set(known, group);
      }
      const row = group.coef[bisectRight(group.edges, sizes.B * sizes.A)];
      const base = this.weights[top], peak = peaks[top];
      let found = base + row[0] * facts.constant_bytes + row[1] * (peak - base), rest = 0;
      facts.feature_columns.forEach((column, i) => { if (row[2 + i]) rest += row[2 + i] * every[column]; });
      found += rest;
      const packing = this.packing(metric, told);
      if (packing) {
        const unit = this.unit(told, facts.packed_share);
        found = Math.max(found, peak + endOf(packing, facts.sure, false) * unit);
        found = Math.min(found, peak + endOf(packing, facts.sure, true) * unit);
      }
      return facts.never_below_live.includes(metric) ? Math.max(found, peak) : found;
    }

    basis(metric) { return metric === "device" && !this.model.artifact.metrics.device ? "reserved" : metric; }

    /** How far outside the swept domain a run lies; 1 inside. */
    stretch({ A, B, L }) {
      const values = { A, B, "B·A": B * A, L };
      let most = 1;
      for (const [column, low, high] of this.domain) {
        most = Math.max(most, values[column] / high, Math.min(low / values[column], this.facts.most_below));
      }
      return most;
    }

    /** What a score is in units of [bytes]. */
    unit(told, share = this.facts.weights_share) {
      const stretch = this.stretch(told.sizes), least = this.facts.least_scale_bytes;
      return told.peaks.reduce((most, peak, i) => Math.max(most, (peak - this.weights[i]) * stretch + share * this.weights[i]), least);
    }

    /** What may lie between live memory and a metric where no runs of its own kind tell it (`Variant.packing`); else null. */
    packing(metric, { place, code }) {
      const { facts } = this;
      if (metric !== facts.decides) return null;
      if (!this.packings.has(code)) {
        const table = this.model.scores[metric] ?? {}, [own] = namesOf(place, facts.families);
        const like = place.offload in facts.streamed ? "streamed" : facts.materialised.includes(place.attention) ? "scores" : "fused";
        const name = [`${facts.unseen}|${like}`, facts.unseen].find((one) => !(own in table) && one in table);
        this.packings.set(code, name ? { least: table[`${name}|${facts.least}`], most: table[name], rough: this.rough(place) } : null);
      }
      return this.packings.get(code);
    }

    /** How much less, and more, than the equation says runs at a place may need (`Place.rough`). */
    rough({ regime }) { return this.facts.regimes[regime].rough ? this.facts.rough : [0, 0]; }

    /** How far above a prediction its one-sided bound lies, or below it [bytes]. */
    margin(metric, told, value, unit, level, upper) {
      const packing = this.packing(metric, told);
      if (!packing) return this.quantile(metric, told, level, upper) * unit;
      const packed = this.unit(told, this.facts.packed_share);
      const beyond = told.peaks[told.top] + endOf(packing, level, upper) * packed - value;
      return Math.max(upper ? beyond : -beyond, 0);
    }

    /** The chance that a run needs no more than some memory. */
    chance({ metric, told, value, unit, level }, memory) {
      const packing = this.packing(metric, told);
      if (packing) {
        const added = (memory - told.peaks[told.top]) / this.unit(told, this.facts.packed_share);
        return packing.most.shareBelow(added - packing.rough[1]);
      }
      return this.scores(metric, told.place, level).shareBelow((memory - value) / unit - this.rough(told.place)[1]);
    }

    /** The scores of the narrowest family that supports a level. */
    scores(metric, place, level) {
      const table = this.model.scores[this.basis(metric)] ?? {};
      let found = this.model.noScores;
      for (const name of namesOf(place, this.facts.families)) {
        found = table[name] ?? found;
        if (Number.isFinite(found.quantile(level))) return found;
      }
      return found;
    }

    quantile(metric, told, level, upper) {
      const known = `${metric} ${told.code} ${level} ${upper}`;
      let found = this.quantiles.get(known);
      if (found === undefined) {
        const scores = this.scores(metric, told.place, level);
        found = Math.max(upper ? scores.quantile(level) : -scores.lowerQuantile(level), 0) + this.rough(told.place)[upper ? 1 : 0];
        this.quantiles.set(known, found);
      }
      return found;
    }

    /** Sizes, products, stage peaks and place of a workload: what every answer starts from. */
    tell(workload) {
      const sizes = sizesOf(this.facts, workload), every = products(sizes), peaks = this.stagePeaks(sizes, every);
      let top = 0;
      for (let i = 1; i < peaks.length; i++) if (peaks[i] > peaks[top]) top = i;
      const place = this.place(top, sizes);
      return { sizes, every, peaks, top, place, code: Object.values(place).join(" ") };
    }
  }

  /** `sdfit.predict.conformal.Packing.end`. */
  function endOf({ least, most, rough }, level, upper) {
    const at = Math.min(level, most.size / (most.size + 1));
    return upper ? most.quantile(at) + rough[1] : least.lowerQuantile(at) - rough[0];
  }

  const namesOf = (place, every) => every.map((fields) => fields.map((field) => {
    const value = place[field];
    return typeof value === "boolean" ? Number(value) : value;
  }).join("|"));

  // -- a model: predictions, verdicts, advice (predictor.py, prediction.py, verdict.py, options.py) --

  class Model {
    constructor(facts, artifact, contextBytes) {
      this.facts = facts; this.artifact = artifact; this.contextBytes = contextBytes;
      this.noScores = new Scores(facts, [0, []]);
      this.scores = Object.fromEntries(Object.entries(artifact.scores).map(([metric, table]) =>
        [metric, Object.fromEntries(Object.entries(table).map(([name, scores]) => [name, new Scores(facts, scores)]))]));
      this.variants = new Map(); this.byDtype = {};
    }

    /** Weights by component; with or without the checker where only the other was swept. */
    weightsOf(dtype) {
      if (this.byDtype[dtype]) return this.byDtype[dtype];
      const found = { ...(this.artifact.components[dtype] ?? {}) };
      if ("safety_checker" in found) {
        for (const vae of this.facts.choices.vae) {
          const checked = `all/${vae}/checked`, unchecked = `all/${vae}/unchecked`, had = checked in found;
          if (had && !(unchecked in found)) found[unchecked] = found[checked] - found.safety_checker;
          else if (!had && unchecked in found) found[checked] = found[unchecked] + found.safety_checker;
        }
      }
      return (this.byDtype[dtype] = found);
    }

    variant(workload) {
      const key = variantOf(this.facts, workload), name = key.join(" ");
      let found = this.variants.get(name);
      if (!found) this.variants.set(name, (found = new Variant(this, key)));
      return found;
    }

    get metrics() {
      const known = new Set(["allocated", ...Object.keys(this.artifact.metrics)]);
      if (known.has("reserved")) known.add("device");
      return this.facts.metrics.filter((name) => known.has(name));
    }

    get bestMetric() { return ["required", "reserved"].find((name) => this.artifact.metrics[name]) ?? "allocated"; }

    get safeLevel() {
      const count = this.artifact.scores[this.bestMetric]?.[""]?.[0] ?? 0;
      return Math.min(this.facts.safe_level, count / (count + 1) || this.facts.safe_level);
    }

    /** A metric of a workload at its peak [bytes], as `Predictor.predict_workload`. */
    predict(workload, metric, level) {
      check(this.facts, workload);
      const variant = this.variant(workload), told = variant.tell(workload);
      return this.prediction(variant, told, metric, level);
    }

    prediction(variant, told, metric, level) {
      const value = variant.metric(metric, told), unit = variant.unit(told), each = (1 + level) / 2;
      const margin = (at, upper) => variant.margin(metric, told, value, unit, at, upper);
      return {
        metric, level, value, unit, variant, told,
        low: Math.max(value - margin(each, false), 0), high: value + margin(each, true),
        lower: Math.max(value - margin(level, false), 0), upper: value + margin(level, true),
        stage: variant.stages[told.top].name,
        stages: variant.stages.map(({ name }, i) => ({ name, peak: told.peaks[i], weights: variant.weights[i] })),
        extrapolated: variant.stretch(told.sizes) > 1,
      };
    }

    /** What the peak of allocated memory is made of [bytes]: weights, then each term of the stage that sets it. */
    breakdown({ variant, told }) {
      const { facts } = this, i = told.top, row = variant.rowOf(i, told.sizes, told.every), weights = variant.weights[i];
      const share = (term) => row[facts.terms.indexOf(term)] * told.every[facts.terms.indexOf(term)] - (term === "1" ? weights : 0);
      const shares = variant.terms[i].map((term) => [term, share(term)]);
      return [["weights", weights], ...shares.filter(([, bytes]) => bytes > 0)];
    }

    /** The bound that decides about fitting; refuses a level that the scores do not support. */
    bound(workload, metric = this.bestMetric, level = this.safeLevel) {
      const found = this.predict(workload, metric, level);
      if (found.upper === Infinity) throw new Invalid(`the model has too few scores for level ${level}`);
      return found;
    }

    /** The upper bound alone [bytes]: what a map asks a thousand times. */
    upper(workload) {
      const variant = this.variant(workload), told = variant.tell(workload), metric = this.bestMetric;
      const value = variant.metric(metric, told);
      return value + variant.margin(metric, told, value, variant.unit(told), this.safeLevel, true);
    }

    verdict(workload, memory) {
      const needed = this.bound(workload);
      const answer = (words, chance, slower = false) => ({ answer: words, chance, slower, memory, margin: memory - needed.upper, prediction: needed });
      const [fits, may, no] = this.facts.answers;
      if (this.artifact.provenance === "traced") return answer(needed.lower > memory ? no : may, null);
      const chance = needed.variant.chance(needed, memory);
      if (needed.upper <= memory) return answer(fits, Math.max(chance, needed.level));
      const slower = needed.lower > memory && this.withoutWorkspaces(workload, needed) <= memory;
      return answer(needed.lower > memory && !slower ? no : may, chance, slower);
    }

    withoutWorkspaces(workload, needed) {
      if (needed.metric !== "required" || !this.artifact.metrics.minimum) return Infinity;
      return this.predict(workload, "minimum", needed.level).upper;
    }

    /** The most images per call that are sure to fit, and that are likely to; 0 where not even one (`sdfit.predict.advise`). */
    largestBatch(workload, memory) {
      const [first, last] = this.facts.limits.batch_size;
      const most = (level) => lastWithin(memory, (batch) => this.bound({ ...workload, batch_size: batch }, undefined, level).upper, first, last);
      const sure = most(this.safeLevel), likely = most(this.facts.likely);
      return { sure, likely: sure && Math.max(sure, likely) };
    }

    /** Which changes make a workload fit, the cheapest first; `half`: whether float16 is one of them. */
    options(workload, memory, half = true) { return new Search(this, workload, memory, half).options(); }
  }

  /** The largest k with upper(k) <= limit; 0 without any. Looked for from the top: bounds fall where a regime begins. */
  function lastWithin(limit, upper, first, last) {
    let k = last;
    while (k >= first && !(upper(k) <= limit)) k -= 1;
    return k < first ? 0 : k;
  }

  class Search {
    constructor(model, workload, limit, half) { Object.assign(this, { model, facts: model.facts, workload, limit, half }); }

    predict(change) {
      try { return this.model.bound({ ...this.workload, ...change }); } catch (error) {
        if (error instanceof Unknown) return null;
        throw error;
      }
    }
    fits(change) { const found = this.predict(change); return found !== null && found.upper <= this.limit; }
    costOf(name, value) { return this.facts.costs[`${name}=${value}`] ?? this.facts.costs[name]; }
    cost(change) { return Object.entries(change).reduce((sum, [name, value]) => sum + this.costOf(name, value)[0], 0); }
    noDearer(one, other) {
      return Object.entries(one).every(([name, value]) =>
        name in other && (value === other[name] || this.costOf(name, value)[0] < this.costOf(name, other[name])[0]));
    }

    options() {
      const now = this.predict({});
      if (now === null || now.upper <= this.limit) return [];
      const found = [];
      for (const change of this.changes()) {
        if (found.some((option) => this.noDearer(option.change, change))) continue;
        const enough = this.sufficient(change, found), prediction = enough && this.predict(enough);
        if (prediction && prediction.upper < now.upper) {
          found.push({ change: enough, upper: prediction.upper, saved: now.upper - prediction.upper, cost: this.cost(enough),
            costs: [...new Set(Object.entries(enough).map(([name, value]) => this.costOf(name, value)[1]))] });
        }
      }
      return found.sort((a, b) => a.cost - b.cost || Object.keys(a.change).length - Object.keys(b.change).length || a.upper - b.upper);
    }

    /** All combinations of single changes, the few and cheap first; last a smaller size. */
    changes() {
      const w = this.workload;
      const half = this.half && w.dtype !== "bfloat16";
      const single = this.facts.saving.filter(([name, value]) => w[name] !== value && (name !== "dtype" || half));
      const every = [];
      for (let count = 0; count <= single.length; count++) {
        for (const some of combinations(single, count)) {
          const change = Object.fromEntries(some);
          if (Object.keys(change).length === count) every.push(change);
        }
      }
      every.sort((a, b) => Object.keys(a).length - Object.keys(b).length || this.cost(a) - this.cost(b));
      const size = this.smallerSize();
      return size ? [...every, size] : every;
    }

    /** The change, if it suffices; else with the largest smaller batch with which it does. */
    sufficient(change, found) {
      if (Object.keys(change).length && this.fits(change)) return change;
      const batch = this.workload.batch_size;
      if (batch === 1 || "height" in change || !this.fits({ ...change, batch_size: 1 })) return null;
      let most = 1;
      for (let parts = 2; parts < batch; parts++) {
        const smaller = Math.ceil(batch / parts);
        if (smaller <= most) break;
        if (this.fits({ ...change, batch_size: smaller })) { most = smaller; break; }
      }
      const fewer = found.map((option) => option.change).filter((other) => (other.batch_size ?? 0) >= most);
      const rest = ({ batch_size: _, ...others }) => others;
      return fewer.some((other) => this.noDearer(rest(other), change)) ? null : { ...change, batch_size: most };
    }

    /** The largest size of the same shape that fits, in steps of a latent along the shorter side. */
    smallerSize() {
      const { height, width } = sizesOf(this.facts, this.workload), step = this.facts.vae_scale;
      const short = Math.min(height, width), long = Math.max(height, width);
      const scaled = (side) => {
        const other = round(side * long / short / step) * step;
        return height <= width ? { height: side, width: other } : { height: other, width: side };
      };
      let low = Math.floor(this.facts.limits.height[0] / step), high = Math.floor(short / step) - 1;
      if (high < low || !this.fits(scaled(low * step))) return null;
      while (low < high) {
        const middle = Math.floor((low + high + 1) / 2);
        if (this.fits(scaled(middle * step))) low = middle; else high = middle - 1;
      }
      return scaled(low * step);
    }
  }

  function* combinations(items, count, start = 0) {
    if (count === 0) { yield []; return; }
    for (let i = start; i <= items.length - count; i++) for (const rest of combinations(items, count - 1, i + 1)) yield [items[i], ...rest];
  }

  return { Model, Unknown, Invalid, check, sizesOf, formatBytes, fixed, round };
})();

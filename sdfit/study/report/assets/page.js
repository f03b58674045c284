// The page: reads the form, asks the model (model.js), shows the answer; draws the maps. No arithmetic of f is here.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { facts, cards, boxes } = data;
  const $ = (id) => document.getElementById(id);
  const form = $("form"), NUMBERS = ["width", "height", "batch_size", "guidance_scale", "prompt_length"];
  const OPTIONS = Object.keys(facts.choices), GIB = 2 ** 30;
  const bytes = sdfit.formatBytes;
  const models = new Map();
  let asked = null;   // the workload last asked about: the maps take their options from it

  /** The model of a card: its artifact, with the card's own CUDA context. */
  function modelOf(card) {
    const key = `${card.model} ${card.context_bytes}`;
    if (!models.has(key)) models.set(key, new sdfit.Model(facts, data.models[card.model], card.context_bytes));
    return models.get(key);
  }
  window.sdfitPage = { data, modelOf, card: () => chosen() };

  const element = (name, attributes = {}, ...inside) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...inside);
    return made;
  };
  const chosen = () => cards[form.card.selectedIndex];

  // -- the form --

  function buildForm() {
    const kinds = new Map();
    for (const card of cards) {
      if (!kinds.has(card.kind)) kinds.set(card.kind, card.kind ? form.card.appendChild(element("optgroup", { label: facts.kinds[card.kind] ?? card.kind })) : form.card);
      kinds.get(card.kind).append(element("option", { value: card.typed }, card.name));
    }
    // options of one kind stand together, so the list is in the order that is shown
    cards.sort((a, b) => [...kinds.keys()].indexOf(a.kind) - [...kinds.keys()].indexOf(b.kind));
    for (const name of NUMBERS) {
      const [low, high] = facts.limits[name] ?? [];
      if (low !== undefined) Object.assign(form[name], { min: low, max: high, step: 1 });
      form[name].value = facts.defaults[name];
    }
    for (const name of OPTIONS) put(name, facts.choices[name][0]);
  }

  function put(name, value) {
    if (form[name].type === "checkbox") form[name].checked = value; else form[name].value = String(value);
  }
  function taken(name) {
    const field = form[name];
    return field.type === "checkbox" ? field.checked : NUMBERS.includes(name) ? (field.value === "" ? NaN : Number(field.value)) : field.value;
  }
  const workload = () => Object.fromEntries([...NUMBERS, ...OPTIONS].map((name) => [name, taken(name)]));

  /** What PyTorch may take [bytes]: what the card leaves, unless an amount was typed. */
  function memory() {
    const card = chosen(), typed = form.memory.value;
    if (card.memory_bytes !== null && typed === shownMemory(card)) return { bytes: card.memory_bytes, words: card.memory };
    const amount = Math.floor(Number(typed) * GIB);
    return { bytes: amount, words: typed === "" ? card.memory : `${bytes(amount)} as given` };
  }
  const shownMemory = (card) => (card.memory_bytes === null ? "" : sdfit.fixed(card.memory_bytes / GIB, 3));

  // -- the address holds what was asked, so an answer can be sent as a link --

  function fromAddress(first = false) {
    const given = new URLSearchParams(location.hash.slice(1));
    if (!first && ![...given.keys()].some((name) => name === "gpu" || NUMBERS.includes(name))) return false;   // an anchor
    const card = cards.findIndex(({ typed }) => typed === (given.get("gpu") ?? data.card));
    form.card.selectedIndex = Math.max(card, 0);
    form.memory.value = given.get("memory") ?? shownMemory(chosen());
    for (const [name, value] of given) {
      if (NUMBERS.includes(name)) form[name].value = value;
      else if (OPTIONS.includes(name)) put(name, form[name].type === "checkbox" ? value === "true" : value);
    }
    return true;
  }
  function toAddress(w) {
    const said = new URLSearchParams();
    if (chosen().typed !== data.card) said.set("gpu", chosen().typed);
    if (form.memory.value !== shownMemory(chosen())) said.set("memory", form.memory.value);
    for (const [name, value] of Object.entries(w)) if (value !== facts.defaults[name]) said.set(name, value);
    try { history.replaceState(null, "", said.size ? `#${said}` : location.pathname + location.search); } catch { /* a page without an address of its own */ }
  }

  // -- the answer --

  function answer() {
    const card = chosen(), model = modelOf(card), w = workload(), there = memory();
    $("memory-words").textContent = there.words;
    markChoices(model, w);
    try {
      if (!(there.bytes >= 1)) throw new sdfit.Invalid("give the memory that PyTorch may take, in GiB");
      const verdict = model.verdict(w, there.bytes);
      const peaks = model.metrics.map((metric) => model.predict(w, metric, facts.level));
      asked = w;
      toAddress(w);
      showVerdict(verdict, w, card);
      showMetrics(model, peaks);
      const live = peaks.find(({ metric }) => metric === "allocated");
      showStages(live);
      showParts(model, live);
      showChanges(verdict.answer === facts.answers[0] ? [] : model.options(w, there.bytes), verdict);
      showCommand(w, card);
      $("told").hidden = false;
    } catch (error) {
      if (!(error instanceof sdfit.Unknown || error instanceof sdfit.Invalid)) throw error;
      $("verdict").textContent = error instanceof sdfit.Unknown ? "Not known" : "Not a run";
      $("verdict").dataset.answer = "";
      $("in-words").textContent = `${error.message}.`;
      for (const id of ["meter", "changes", "strip"]) $(id).replaceChildren();
      $("told").hidden = true;
    }
  }

  /** Say beside each choice whether the model knows it together with the others that are chosen. */
  function markChoices(model, w) {
    for (const name of OPTIONS) {
      for (const option of form[name].options ?? []) {
        let known = true;
        try { model.variant({ ...w, [name]: option.value }); } catch (error) {
          if (!(error instanceof sdfit.Unknown)) throw error;
          known = false;
        }
        option.textContent = option.value + (known ? "" : " (not known)");
      }
    }
  }

  const SIGNS = { fits: "✓ ", "may fit": "≈ ", "does not fit": "✕ " };

  function showVerdict({ answer: words, chance, slower, margin, memory: there, prediction: p }, w, card) {
    $("verdict").dataset.answer = words;
    $("verdict").replaceChildren(element("span", { "aria-hidden": "true" }, SIGNS[words]), words[0].toUpperCase() + words.slice(1),
      ...(words === "may fit" && chance !== null ? [element("small", {}, ` with a chance of ${Math.round(100 * chance)} %`)] : []));
    const lines = [`${p.metric[0].toUpperCase() + p.metric.slice(1)}: ${bytes(p.value)}, at most ${bytes(p.upper)} at level ${Number(p.level.toPrecision(3))}; ${bytes(Math.abs(margin))} ${margin >= 0 ? "to spare" : "too much"}.`];
    if (slower) lines.push("It is likely to run, with slower kernels: convolutions would go without their workspaces.");
    if (chance === null) lines.push("This model is only traced, without kernel workspaces: it never says that a run fits.");
    if (p.extrapolated) lines.push("Outside the swept sizes: the intervals are widened by guess.");
    if (card.wrong_half && w.dtype === "float16") lines.push(`${facts.wrong_half}.`);
    const { height, width, n } = p.told.sizes;
    lines.push(`Runs as ${height}x${width} (height x width), ${w.batch_size} image${w.batch_size > 1 ? "s" : ""}, ${n} UNet sample${n > 1 ? "s" : ""}.`);
    $("in-words").textContent = lines.join(" ");
    $("strip").replaceChildren(element("b", {}, $("verdict").textContent), element("span", {}, `${bytes(p.value)} of ${bytes(there)}`));
    const most = Math.max(there, p.upper) * 1.02, share = (amount) => `${(100 * Math.min(amount, most) / most).toFixed(2)}%`;
    const late = there / most > 0.6;
    const meter = element("div", { class: "meter", role: "img", "aria-label": `${bytes(p.value)} of ${bytes(there)}` },
      element("b", { style: `left:0;width:${share(p.upper)}` }), element("i", { style: `width:${share(p.value)}` }),
      element("u", { style: `left:${share(there)}` }),
      element("span", { style: late ? `right:calc(100% - ${share(there)})` : `left:${share(there)}` }, `memory ${bytes(there)}`));
    $("meter").replaceChildren(meter);
  }

  const MEANS = { required: "smallest cap under which it runs", allocated: "live blocks", reserved: "segments taken from the driver", device: "what nvidia-smi shows", minimum: "smallest cap if no kernel takes a workspace: slower" };
  const whole = (amount) => (Number.isFinite(amount) ? sdfit.round(amount).toLocaleString("en-US") : "unknown");

  function rows(table, head, body) {
    const line = (cells, cell) => {
      const made = cells.map((inside) => (inside instanceof Node ? inside : element(cell, {}, inside)));
      if (cell === "td") made.forEach((one, i) => { if (head[i]) one.dataset.label = head[i]; });   // shown where columns become lines
      return element("tr", {}, ...made);
    };
    table.replaceChildren(element("thead", {}, line(head, "th")), element("tbody", {}, ...body.map((cells) => line(cells, "td"))));
  }

  function showMetrics(model, peaks) {
    const best = model.bestMetric, sorted = [...peaks].sort((a, b) => (b.metric === best) - (a.metric === best));
    const both = (shown, exact) => element("td", {}, shown, element("br"), element("small", {}, exact));
    rows($("metrics"), ["", "peak", `${100 * facts.level} % interval`, `at most, ${100 * facts.level} %`], sorted.map((p) => [
      element("td", {}, element("strong", {}, p.metric), element("br"), element("small", {}, MEANS[p.metric])),
      both(bytes(p.value), `${whole(p.value)} B`),
      both(Number.isFinite(p.high) ? `${bytes(p.low)} to ${bytes(p.high)}` : "unknown", `${whole(p.low)} to ${whole(p.high)} B`),
      both(Number.isFinite(p.upper) ? bytes(p.upper) : "unknown", `${whole(p.upper)} B`)]));
  }

  function showStages(live) {
    const most = Math.max(...live.stages.map(({ peak }) => peak));
    $("stages").replaceChildren(...live.stages.map(({ name, peak, weights }) => {
      const share = (amount) => `width:${(100 * amount / most).toFixed(2)}%`;
      return element("div", { class: name === live.stage ? "bar top-stage" : "bar" }, element("span", {}, facts.titles[name]),
        element("span", { class: "track" }, element("i", { style: share(weights), title: `weights ${bytes(weights)}` }), element("b", { style: share(peak - weights), title: `above the weights ${bytes(peak - weights)}` })),
        element("span", { class: "amount" }, bytes(peak)));
    }), element("p", { class: "hint" }, "Lighter: weights that are on the card. Darker: what the stage itself holds."));
  }

  function showParts(model, live) {
    $("parts-title").textContent = `What the peak is made of: ${facts.titles[live.stage]}`;
    const meaning = (term) => element("td", { class: "words" }, term === "weights" ? "of what is on the card in that stage" : facts.meanings[term]);
    rows($("parts"), ["", "amount", "[B]", ""], model.breakdown(live).map(([term, amount]) => [term, bytes(amount), whole(amount), meaning(term)]));
  }

  function showChanges(options, verdict) {
    if (verdict.answer === facts.answers[0]) { $("changes").replaceChildren(); return; }
    const shown = options.slice(0, 6).map((option) => {
      const change = Object.entries(option.change).map(([name, value]) => `${name}=${pythonic(value)}`).join(", ");
      const apply = element("button", { type: "button" }, "Apply");
      apply.setAttribute("aria-label", `Apply ${change}`);
      apply.addEventListener("click", () => { for (const [name, value] of Object.entries(option.change)) put(name, value); answer(); drawMaps(); });
      return element("li", {}, element("span", {}, element("code", {}, change), element("small", {}, `at most ${bytes(option.upper)}, saves ${bytes(option.saved)}. Costs: ${option.costs.join("; ")}.`)), apply);
    });
    $("changes").replaceChildren(...(shown.length ? [element("h3", {}, "The cheapest changes with which it would fit"), element("ul", { class: "changes" }, ...shown)]
      : [element("p", {}, "No change that is known makes it fit.")]));
  }
  const pythonic = (value) => (value === true ? "True" : value === false ? "False" : value);

  function showCommand(w, card) {
    const flags = Object.entries(w).filter(([name, value]) => value !== facts.defaults[name] || name === "height" || name === "width").map(([name, value]) => {
      const flag = name.replaceAll("_", "-");
      return typeof value === "boolean" ? (value ? `--${flag}` : `--no-${flag}`) : `--${flag} ${value}`;
    });
    const amount = form.memory.value === shownMemory(card) ? "" : ` --memory ${form.memory.value}GiB`;
    $("command").textContent = `sdfit fits --gpu ${/\s/.test(card.typed) ? `"${card.typed}"` : card.typed}${amount} ${flags.join(" ")}`;
  }

  // -- the picture --

  async function readPicture(file) {
    if (!file) return;
    const found = await pictures.size(file);
    if (!found) { $("picture-words").textContent = `${file.name}: not a picture whose header can be read here; type its size.`; return; }
    form.height.value = found.height; form.width.value = found.width;
    $("picture-words").textContent = `${file.name}: ${found.width} wide, ${found.height} high.`;
    answer();
  }

  // -- the maps --

  const FROM = 256, STEP = 64, SIDES = Array.from({ length: 44 }, (_, i) => FROM + STEP * i), CELL = 10;
  const LAST = SIDES.length - 1;
  const SPAN = SIDES.length * CELL;
  const tint = (share) => `color-mix(in oklab, var(--accent) ${share}%, var(--panel))`;
  const BOX_FILL = [9, 24, 41, 58, 78, 100].map(tint);
  const BEYOND = "url(#beyond)";
  const STAGE_FILL = { vae_decoder_blocks: tint(100), vae_decoder_mid: tint(62), unet: tint(32), vae_encoder_blocks: tint(14), vae_encoder_mid: tint(14), text_encoder: "color-mix(in oklab, var(--muted) 45%, var(--panel))", safety_checker: "color-mix(in oklab, var(--muted) 45%, var(--panel))" };
  const HATCH = `<defs><pattern id="beyond" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path d="M0 0V6" stroke="var(--muted)" stroke-width="1.1" opacity=".55"/></pattern></defs>`;
  let at = { column: 12, row: 12 };

  /** Cells of the same value as few rectangles: runs along each column. */
  function cells(value, fills) {
    const paths = {};
    SIDES.forEach((_, column) => {
      for (let row = 0; row <= LAST;) {
        const found = value[column][row], from = row;
        while (row <= LAST && value[column][row] === found) row++;
        (paths[found] ??= []).push(`M${column * CELL} ${SPAN - from * CELL}v${-(row - from) * CELL}h${CELL}v${(row - from) * CELL}z`);
      }
    });
    return Object.entries(paths).map(([found, path]) => `<path d="${path.join("")}" fill="${fills(found)}" shape-rendering="crispEdges"/>`).join("");
  }

  /** A map with its axes; a small one has larger marks, few of them, and no titles. */
  function plot(inside, title, ticks, { small = false, extra = "" } = {}) {
    const edge = small ? { left: 74, top: 6, right: 30, bottom: 34 } : { left: 72, top: 8, right: 8, bottom: 46 };
    const marks = ticks.map((side) => {
      const x = ((side - FROM) / STEP + 0.5) * CELL, low = small ? 30 : 18;
      return `<text class="tick" x="${x}" y="${SPAN + low}">${side}</text><text class="tick end" x="-7" y="${SPAN - x + low / 4}">${side}</text>`;
    }).join("");
    const titles = small ? "" : `<text class="axis" x="${SPAN / 2}" y="${SPAN + 40}">width [px]</text><text class="axis" transform="translate(-57 ${SPAN / 2}) rotate(-90)">height [px]</text>`;
    return `<svg viewBox="${-edge.left} ${-edge.top} ${SPAN + edge.left + edge.right} ${SPAN + edge.top + edge.bottom}" ${extra} role="img" aria-label="${title}">${HATCH}${inside}<rect class="frame" width="${SPAN}" height="${SPAN}"/>${marks}${titles}<g class="cross"></g></svg>`;
  }

  function drawMaps() {
    if (asked === null) return;
    drawFits(); drawStages();
  }

  function mapWorkload(column, row) { return { ...asked, width: SIDES[column], height: SIDES[row], batch_size: Number($("map-batch").value) }; }

  function drawFits() {
    const model = modelOf(chosen());
    const value = SIDES.map((_, column) => SIDES.map((__, row) => {
      const upper = model.upper(mapWorkload(column, row)), box = boxes.findIndex(({ memory_bytes: there }) => upper <= there);
      return box < 0 ? "beyond" : box;
    }));
    const fill = (found) => (found === "beyond" ? BEYOND : BOX_FILL[found]);
    $("fits-map").innerHTML = plot(cells(value, fill), "The smallest card that is sure to do, over width and height", [512, 1024, 1536, 2048, 2560], { extra: `tabindex="0"` });
    const used = new Set(value.flat().map(String));
    $("fits-legend").innerHTML = [...boxes.map(({ gib, memory_bytes: there }, i) => [BOX_FILL[i], `${gib} GB`, `leaves ${bytes(there)}`, String(i)]), [BEYOND, "more", "than 24 GB", "beyond"]]
      .map(([colour, name, words, key]) => `<li><svg viewBox="0 0 12 12"><rect width="12" height="12" fill="${colour}"/></svg>${name} <small>${words}${used.has(key) ? "" : "; none here"}</small></li>`).join("");
    point();
  }

  function point() {
    const cross = $("fits-map").querySelector(".cross"), { column, row } = at;
    cross.innerHTML = `<path d="M${(column + 0.5) * CELL} 0V${SPAN}M0 ${SPAN - (row + 0.5) * CELL}H${SPAN}" opacity=".35"/><rect x="${column * CELL}" y="${SPAN - (row + 1) * CELL}" width="${CELL}" height="${CELL}"/>`;
    const w = mapWorkload(column, row), upper = modelOf(chosen()).upper(w), box = boxes.find(({ memory_bytes: there }) => upper <= there);
    $("fits-words").textContent = `${w.width} wide, ${w.height} high, ${w.batch_size} image${w.batch_size > 1 ? "s" : ""}: at most ${bytes(upper)}. ${box ? `Sure to fit on ${box.gib} GB.` : "Not sure to fit on 24 GB."}`;
  }

  function drawStages() {
    const model = modelOf(chosen()), seen = new Set();
    const panels = [];
    for (const attention of facts.choices.attention) {
      try {
        const value = SIDES.map((_, column) => SIDES.map((__, row) => {
          const w = { ...mapWorkload(column, row), attention }, variant = model.variant(w), stage = variant.stages[variant.tell(w).top].name;
          seen.add(stage);
          return stage;
        }));
        const inside = cells(value, (stage) => STAGE_FILL[stage]);
        panels.push(`<div><h4>${attention}</h4>${plot(inside, `Stage that sets the peak, attention ${attention}`, [512, 1536, 2560], { small: true })}</div>`);
      } catch (error) {
        if (!(error instanceof sdfit.Unknown)) throw error;   // a kind that the model does not know has no map
      }
    }
    $("stage-maps").innerHTML = panels.join("");
    $("stage-legend").innerHTML = facts.stages.filter(({ name }) => seen.has(name)).map(({ name }) => `<li><svg viewBox="0 0 12 12"><rect width="12" height="12" fill="${STAGE_FILL[name]}"/></svg>${facts.titles[name]}</li>`).join("");
  }

  function followMap() {
    const map = $("fits-map");
    const move = (column, row) => { at = { column: Math.min(Math.max(column, 0), LAST), row: Math.min(Math.max(row, 0), LAST) }; point(); };
    const take = () => { form.width.value = SIDES[at.column]; form.height.value = SIDES[at.row]; form.batch_size.value = $("map-batch").value; answer(); };
    const under = (event) => {
      const svg = map.querySelector("svg"), spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      if (spot.x >= 0 && spot.y >= 0 && spot.x < SPAN && spot.y < SPAN) move(Math.floor(spot.x / CELL), Math.floor((SPAN - spot.y) / CELL));
    };
    map.addEventListener("pointermove", under);
    map.addEventListener("click", (event) => { under(event); take(); });
    map.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (step) { move(at.column + step[0], at.row + step[1]); event.preventDefault(); }
      if (event.key === "Enter") { take(); event.preventDefault(); }
    });
  }

  /** The map's batch is that of the form, until its own slider is moved. */
  function followBatch() { $("map-batch").value = form.batch_size.value; $("map-batch-shown").textContent = $("map-batch").value; }

  // -- start --

  function theme() {
    const pick = $("theme"), put = (name) => { if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme; };
    try { pick.value = localStorage.getItem("sdfit-theme") ?? ""; } catch { /* storage is off */ }
    put(pick.value);
    pick.addEventListener("change", () => { put(pick.value); try { localStorage.setItem("sdfit-theme", pick.value); } catch { /* storage is off */ } });
  }

  theme();
  buildForm();
  fromAddress(true);
  answer();
  followBatch();
  drawMaps();
  followMap();
  let later = 0;
  const soon = () => { cancelAnimationFrame(later); later = requestAnimationFrame(drawMaps); };
  form.addEventListener("input", (event) => {
    if (event.target === form.card) form.memory.value = shownMemory(chosen());
    if (event.target.type === "file") return;
    if (event.target === form.batch_size) followBatch();
    answer(); soon();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  $("map-batch").addEventListener("input", () => { $("map-batch-shown").textContent = $("map-batch").value; soon(); });
  $("picture").addEventListener("change", (event) => readPicture(event.target.files[0]));
  for (const name of ["dragover", "dragleave", "drop"]) {
    $("drop").addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") readPicture(event.dataTransfer.files[0]);
    });
  }
  addEventListener("hashchange", () => { if (fromAddress()) { answer(); followBatch(); soon(); $("calculator").scrollIntoView(); } });

  // the index: find a card, and put it into the calculator
  const find = $("find");
  if (find) {
    const lines = [...document.querySelectorAll("#cards-table tbody tr")];
    find.addEventListener("input", () => {
      const words = find.value.toLowerCase().split(/\s+/);
      for (const line of lines) line.hidden = !words.every((word) => line.textContent.toLowerCase().includes(word));
    });
  }
})();

// The page: reads the form, asks the model (model.js), shows the answer; draws the maps. No arithmetic of f is here.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { facts, cards, boxes } = data;
  const $ = (id) => document.getElementById(id);
  const form = $("form"), shell = $("copy").parentElement, NUMBERS = ["width", "height", "batch_size", "guidance_scale", "prompt_length"];
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
      showVerdict(verdict, w, card, model.largestBatch(w, there.bytes));
      showMetrics(model, peaks);
      const live = peaks.find(({ metric }) => metric === "allocated");
      showStages(live);
      showParts(model, live);
      showChanges(verdict.answer === facts.answers[0] ? [] : model.options(w, there.bytes, !card.wrong_half), verdict);
      showCommand(w, card, verdict.answer === facts.answers[1] && !verdict.slower
        ? "The equation cannot decide this one. This command simulates the run itself, where it knows how, and then nearly always can:" : "");
      for (const one of [$("told"), shell]) one.hidden = false;
    } catch (error) {
      if (!(error instanceof sdfit.Unknown || error instanceof sdfit.Invalid)) throw error;
      $("verdict").textContent = error instanceof sdfit.Unknown ? "Not known" : "Not a run";
      $("verdict").dataset.answer = "";
      $("in-words").textContent = `${error.message}.`;
      for (const id of ["meter", "changes", "strip"]) $(id).replaceChildren();
      $("told").hidden = true;
      shell.hidden = !(error instanceof sdfit.Unknown && data.models[card.model].simulates);
      if (!shell.hidden) showCommand(w, card, "The equation was not fitted to this combination. This command simulates the run itself, where it knows how:");
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

  function showVerdict({ answer: words, chance, slower, margin, memory: there, prediction: p }, w, card, batch) {
    $("verdict").dataset.answer = words;
    $("verdict").replaceChildren(element("span", { "aria-hidden": "true" }, SIGNS[words]), words[0].toUpperCase() + words.slice(1),
      ...(slower ? [element("small", {}, " with slower kernels")] : words === "may fit" && chance !== null ? [element("small", {}, ` with a chance of ${Math.round(100 * chance)} %`)] : []));
    const lines = [`${p.metric[0].toUpperCase() + p.metric.slice(1)} by the equation: ${bytes(p.value)}, at most ${bytes(p.upper)} at level ${Number(p.level.toPrecision(3))}; ${bytes(Math.abs(margin))} ${margin >= 0 ? "to spare" : "too much"}.`];
    if (slower) lines.push("It is likely to run: convolutions would go without their workspaces, which no published number shows.");
    if (chance === null) lines.push("This model is only traced, without kernel workspaces: it never says that a run fits.");
    if (p.extrapolated) lines.push("Outside the swept sizes: the intervals are widened by guess.");
    if (card.wrong_half && w.dtype === "float16") lines.push(`${facts.wrong_half}.`);
    const { height, width, n } = p.told.sizes;
    lines.push(`Runs as ${height}x${width} (height x width), ${w.batch_size} image${w.batch_size > 1 ? "s" : ""}, ${n} UNet sample${n > 1 ? "s" : ""}.`);
    if (chance !== null) lines.push(batchInWords(batch));
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

  function batchInWords({ sure, likely }) {
    if (!sure) return "Not even one image of this size is sure to fit.";
    const most = sure > 1 ? `Up to ${sure} images of this size per call are sure to fit` : "One image of this size per call is sure to fit";
    return likely > sure ? `${most}, ${likely} likely.` : `${most}.`;
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
    }), element("p", { class: "hint" }, "First the weights that are on the card, then what the stage itself holds."));
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
      apply.addEventListener("click", () => { for (const [name, value] of Object.entries(option.change)) put(name, value); answer(); map.draw(); });
      return element("li", {}, element("span", {}, element("code", {}, change), element("small", {}, `at most ${bytes(option.upper)}, saves ${bytes(option.saved)}. Costs: ${option.costs.join("; ")}.`)), apply);
    });
    $("changes").replaceChildren(...(shown.length ? [element("h3", {}, "The cheapest changes with which it would fit"), element("ul", { class: "changes" }, ...shown)]
      : [element("p", {}, "No change that is known makes it fit.")]));
  }
  const pythonic = (value) => (value === true ? "True" : value === false ? "False" : value);

  /** The command that asks the same, and what it knows beyond this page: it simulates the run where the model rests on simulations. */
  function showCommand(w, card, why) {
    const { simulates } = data.models[card.model];
    shell.classList.toggle("undecided", simulates && why !== "");
    $("shell-words").textContent = !simulates ? "The same from a shell; on the machine it knows how much memory is free, too."
      : why || "The same from a shell, which simulates the run itself where it knows how: what it says is required may differ from this, and is the better number.";
    $("copy").textContent = "Copy";
    const always = ["height", "width", ...(card.wrong_half ? ["dtype"] : [])];  // there a shell takes float32 if not told otherwise
    const flags = Object.entries(w).filter(([name, value]) => value !== facts.defaults[name] || always.includes(name)).map(([name, value]) => {
      const flag = name.replaceAll("_", "-");
      return typeof value === "boolean" ? (value ? `--${flag}` : `--no-${flag}`) : `--${flag} ${value}`;
    });
    const amount = form.memory.value === shownMemory(card) ? [] : [`--memory ${form.memory.value}GiB`];
    const parts = ["sdfit fits", `--gpu ${/\s/.test(card.typed) ? `"${card.typed}"` : card.typed}`, ...amount, ...flags];
    // a narrow page breaks the line between options, never inside one
    $("command").replaceChildren(...parts.flatMap((word, i) => [i ? " " : "", element("span", { class: "whole" }, word)]));
  }

  async function copyCommand() {
    try {
      await navigator.clipboard.writeText($("command").textContent);
      $("copy").textContent = "Copied";
    } catch {   // not allowed here: select it, so that the keyboard can
      getSelection().selectAllChildren($("command"));
      $("copy").textContent = "Selected";
    }
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

  // -- the maps (maps.js) --

  const map = maps({ facts, boxes, model: () => modelOf(chosen()), asked: () => asked, take: (size) => {
    for (const [name, value] of Object.entries(size)) form[name].value = value;
    answer();
  } });

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
  map.draw();
  let later = 0;
  const soon = () => { cancelAnimationFrame(later); later = requestAnimationFrame(map.draw); };
  form.addEventListener("input", (event) => {
    if (event.target === form.card) form.memory.value = shownMemory(chosen());
    if (event.target.type === "file") return;
    if (event.target === form.batch_size) followBatch();
    answer(); soon();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  $("map-batch").addEventListener("input", () => { $("map-batch-shown").textContent = $("map-batch").value; soon(); });
  $("copy").addEventListener("click", copyCommand);
  $("picture").addEventListener("change", (event) => readPicture(event.target.files[0]));
  for (const name of ["dragover", "dragleave", "drop"]) {  // anywhere: a browser would leave the page for a picture dropped beside
    addEventListener(name, (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
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

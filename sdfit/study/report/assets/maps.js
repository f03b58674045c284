// The maps over width and height: the smallest card that is sure to do, and the stage that sets the peak.
"use strict";

/** Draw both maps; `model` and `asked` give the model and the run of the calculator, `take` puts a size into it. */
const maps = ({ facts, boxes, model, asked, take }) => {
  const $ = (id) => document.getElementById(id), bytes = sdfit.formatBytes;
  const FROM = 256, STEP = 64, SIDES = Array.from({ length: 44 }, (_, i) => FROM + STEP * i), CELL = 10;
  const LAST = SIDES.length - 1;
  const SPAN = SIDES.length * CELL;
  const tint = (share) => `color-mix(in oklab, var(--accent) ${share}%, var(--panel))`;
  const BOX_FILL = [9, 24, 41, 58, 78, 100].map(tint);
  const BEYOND = "url(#beyond)";
  const STAGE_FILL = { vae_decoder_blocks: tint(100), vae_decoder_mid: tint(62), unet: tint(32), unet_deep: tint(48), vae_encoder_blocks: tint(14), vae_encoder_mid: tint(14), text_encoder: "color-mix(in oklab, var(--muted) 45%, var(--panel))", safety_checker: "color-mix(in oklab, var(--muted) 45%, var(--panel))" };
  const HATCH = `<defs><pattern id="beyond" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path d="M0 0V6" stroke="var(--muted)" stroke-width="1.1" opacity=".55"/></pattern></defs>`;
  let at = { column: 12, row: 12 };   // the cell that is pointed at

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
    const titles = small ? "" : `<text class="axis" x="${SPAN / 2}" y="${SPAN + 40}">width [px]<tspan class="across">, height up</tspan></text><text class="axis up" transform="translate(-57 ${SPAN / 2}) rotate(-90)">height [px]</text>`;
    return `<svg viewBox="${-edge.left} ${-edge.top} ${SPAN + edge.left + edge.right} ${SPAN + edge.top + edge.bottom}" ${extra} role="img" aria-label="${title}">${HATCH}${inside}<rect class="frame" width="${SPAN}" height="${SPAN}"/>${marks}${titles}<g class="cross"></g></svg>`;
  }

  /** The run of a cell: the options of the calculator, the batch of the slider. */
  function run(column, row) { return { ...asked(), width: SIDES[column], height: SIDES[row], batch_size: Number($("map-batch").value) }; }

  function drawFits() {
    const f = model();
    const value = SIDES.map((_, column) => SIDES.map((__, row) => {
      const upper = f.upper(run(column, row)), box = boxes.findIndex(({ memory_bytes: there }) => upper <= there);
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
    const w = run(column, row), upper = model().upper(w), box = boxes.find(({ memory_bytes: there }) => upper <= there);
    $("fits-words").textContent = `${w.width} wide, ${w.height} high, ${w.batch_size} image${w.batch_size > 1 ? "s" : ""}: at most ${bytes(upper)}. ${box ? `Sure to fit on ${box.gib} GB.` : "Not sure to fit on 24 GB."}`;
  }

  function drawStages() {
    const f = model(), seen = new Set(), panels = [];
    for (const attention of facts.choices.attention) {
      try {
        const value = SIDES.map((_, column) => SIDES.map((__, row) => {
          const w = { ...run(column, row), attention }, variant = f.variant(w), stage = variant.stages[variant.tell(w).top].name;
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

  function move(column, row) {
    at = { column: Math.min(Math.max(column, 0), LAST), row: Math.min(Math.max(row, 0), LAST) };
    point();
  }
  const put = () => take({ width: SIDES[at.column], height: SIDES[at.row], batch_size: $("map-batch").value });
  function under(event) {
    const svg = $("fits-map").querySelector("svg"), spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (spot.x >= 0 && spot.y >= 0 && spot.x < SPAN && spot.y < SPAN) move(Math.floor(spot.x / CELL), Math.floor((SPAN - spot.y) / CELL));
  }
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  $("fits-map").addEventListener("pointermove", (event) => { if (asked()) under(event); });
  $("fits-map").addEventListener("click", (event) => { if (asked()) { under(event); put(); } });
  $("fits-map").addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (step) move(at.column + step[0], at.row + step[1]);
    else if (event.key === "Enter") put();
    else return;
    event.preventDefault();
  });

  return { draw() { if (asked()) { drawFits(); drawStages(); } } };
};

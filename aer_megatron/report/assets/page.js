// The report's page: head, charts, maps, configuration. Text of a run enters the document by textContent alone.
"use strict";
const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs;
  const root = document.documentElement;

  // ---- text and elements ----
  // C0 and C1 controls, marks that change the direction, and characters without a width are made visible
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const visible = (text) => String(text).replace(HIDDEN, (character) => {
    const code = character.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
  });
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "class") made.className = value;
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value != null) made.setAttribute(name, value);
    }
    for (const child of children.flat()) {
      if (child != null) made.append(child instanceof Node ? child : document.createTextNode(visible(child)));
    }
    return made;
  };
  const swatch = (color) => {
    const made = element("i", {class: "swatch"});
    made.style.background = color;
    return made;
  };
  const number = (value) => {
    if (value == null) return "–";
    if (Number.isInteger(value)) return Math.abs(value) < 1e6 ? String(value) : value.toPrecision(4);
    const size = Math.abs(value);
    return size < 1e-3 || size >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const duration = (seconds) => {
    if (seconds < 90) return `${number(Math.round(seconds))} s`;
    return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
  };

  // ---- what the reader chose; it outlives a redrawn page ----
  const stored = (name, otherwise) => {
    try { return sessionStorage.getItem(`aer-${name}`) ?? otherwise; } catch { return otherwise; }
  };
  const store = (name, value) => {
    try { sessionStorage.setItem(`aer-${name}`, value); } catch { /* a page from a file may have no storage */ }
  };
  const asked = new URLSearchParams(location.hash.slice(1));  // report.html#theme=dark
  let smoothing = Number(stored("smoothing", 5));  // per cent of a curve's points
  const groups = [...new Set(runs.map((run) => run.group))];
  const hasSeeds = groups.length < runs.length;
  let seedsAsBand = hasSeeds && stored("seeds", "band") === "band";
  const hiddenRuns = new Set();
  const setTheme = (theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };
  setTheme(asked.get("theme") ?? stored("theme", ""));
  const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colorOf = (index) => css(`--c${index % 8}`);
  const faint = (color, alpha) => color + Math.round(alpha * 255).toString(16).padStart(2, "0");
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];

  // ---- curves ----
  const curveOf = (run, name) => {
    const curve = run.curves[name];
    if (!curve) return {x: [], y: []};
    const [x, y] = Array.isArray(curve) ? [run.steps, curve] : [curve.steps, curve.values];
    const at = y.flatMap((value, index) => value == null ? [] : [index]);
    return {x: at.map((index) => x[index]), y: at.map((index) => y[index])};
  };
  const lastOf = (run, name) => curveOf(run, name).y.at(-1);
  const smooth = (values) => {
    const half = Math.floor(values.length * smoothing / 200);
    if (half < 1) return null;
    const sums = [0];
    for (const value of values) sums.push(sums.at(-1) + value);
    return values.map((_, index) => {
      const start = Math.max(index - half, 0), end = Math.min(index + half + 1, values.length);
      return (sums[end] - sums[start]) / (end - start);
    });
  };
  // What is drawn as one: a run, or the runs that differ in their seed alone.
  const unitsOf = () => {
    const shown = runs.filter((run) => !hiddenRuns.has(run));
    if (!seedsAsBand) return shown.map((run) => ({label: run.label, color: runs.indexOf(run), runs: [run]}));
    return groups.map((group, index) => {
      const members = shown.filter((run) => run.group === group);
      const label = members.length > 1 ? `${members[0].label}, ${members.length} seeds` : members[0]?.label;
      return {label, color: index, runs: members};
    }).filter((unit) => unit.runs.length);
  };
  const unitCurve = (unit, series) => {
    if (unit.runs.length === 1) {
      const curve = curveOf(unit.runs[0], series.name);
      if (series.low) {
        curve.low = curveOf(unit.runs[0], series.low);
        curve.high = curveOf(unit.runs[0], series.high);
      }
      return curve;
    }
    const at = new Map();
    for (const run of unit.runs) {
      const {x, y} = curveOf(run, series.name);
      x.forEach((step, index) => at.set(step, [...(at.get(step) ?? []), y[index]]));
    }
    const x = [...at.keys()].sort((a, b) => a - b);
    const of = (reduce) => x.map((step) => reduce(at.get(step)));
    return {
      x, y: of((values) => values.reduce((a, b) => a + b) / values.length),
      low: {x, y: of((values) => Math.min(...values))}, high: {x, y: of((values) => Math.max(...values))},
    };
  };

  // ---- charts ----
  const lastStep = Math.max(1, ...runs.flatMap((run) => run.steps.slice(-1)));
  const firstStep = Math.min(...runs.flatMap((run) => run.steps.slice(0, 1)));
  const whole = {min: Math.min(firstStep, lastStep - 1), max: lastStep};
  let zoom = {...whole}, zooming = false;
  const cards = new Set();
  const zoomTo = (range, from) => {
    if (zooming) return;
    zooming = true;
    zoom = {...range};
    for (const card of cards) if (card.plot && card.plot !== from) card.plot.setScale("x", range);
    zooming = false;
    document.getElementById("unzoom").hidden = zoom.min === whole.min && zoom.max === whole.max;
  };
  const padded = (_, low, high) => {
    if (low == null) return [0, 1];
    const isFlat = high - low <= 1e-9 * Math.abs(high);
    const pad = isFlat ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.06;
    const least = low >= 0 && (low - pad < 0 || low < 0.4 * high) ? 0 : low - pad;
    return [least, high + pad];
  };
  const axis = () => ({
    stroke: css("--muted"), font: "11px system-ui, sans-serif", size: 50, gap: 4,
    grid: {stroke: css("--grid"), width: 1}, ticks: {show: false},
    values: (_, splits) => splits.map((value) => value == null ? "" : number(value)),
  });
  const marks = (plot) => {
    const alarms = unitsOf().flatMap((unit) => unit.runs).flatMap((run) => run.alarms);
    const {ctx, bbox} = plot, size = 5 * devicePixelRatio;
    ctx.save();
    ctx.setLineDash([]);
    ctx.lineWidth = devicePixelRatio;
    ctx.fillStyle = ctx.strokeStyle = css("--alarm");
    for (const [step] of alarms) {
      if (step < plot.scales.x.min || step > plot.scales.x.max) continue;
      const x = plot.valToPos(step, "x", true);
      ctx.globalAlpha = 0.9;
      ctx.beginPath();
      ctx.moveTo(x - size, bbox.top);
      ctx.lineTo(x + size, bbox.top);
      ctx.lineTo(x, bbox.top + 1.6 * size);
      ctx.fill();
      if (alarms.length > 40) continue;
      ctx.globalAlpha = 0.35;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  };

  class Card {
    constructor(chart) {
      this.chart = chart;
      this.at = element("span", {class: "at"});
      this.place = element("div", {class: "plot"});
      this.legend = element("div", {class: "legend"});
      this.note = chart.reasons || chart.lines ? element("p", {class: "note"}) : null;
      const meaning = chart.series.map((each) => each.meaning).filter(Boolean).join("\n");
      const unit = chart.unit && chart.unit !== "1" ? element("small", {}, chart.unit) : null;
      this.node = element("article", {class: "card"},
        element("header", {title: meaning}, element("h3", {}, chart.title), unit, this.at), this.place, this.legend, this.note);
      this.hiddenEntries = new Set();
      this.stale = true;
      cards.add(this);
    }

    draw() {
      this.stale = false;
      this.plot?.destroy();
      const {columns, series, bands} = this.columns();
      const width = this.place.clientWidth || 300;
      this.plot = new uPlot({
        width, height: width < 340 ? 180 : 210, series, bands, padding: [10, 8, 0, 0],
        scales: {x: {time: false}, y: {range: padded}},
        axes: [{...axis(), size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6]}, axis()],
        legend: {show: false},
        cursor: {
          sync: {key: "steps", setSeries: false}, points: {size: 6}, y: false, drag: {x: true, y: false},
          bind: {dblclick: () => () => zoomTo(whole)},
        },
        hooks: {
          draw: [marks], setCursor: [() => this.tell()],
          setScale: [(plot, key) => { if (key === "x" && this.plot === plot) zoomTo({min: plot.scales.x.min, max: plot.scales.x.max}, plot); }],
        },
      }, columns, this.place);
      const wasZooming = zooming;
      zooming = true;
      this.plot.setScale("x", zoom);
      zooming = wasZooming;
      this.drawLegend();
      this.tell();
    }

    // Returns uPlot's aligned columns; this.entries are those of the legend, each with its columns of values.
    columns() {
      const units = unitsOf(), single = units.length === 1;
      const curves = units.flatMap((unit) => this.chart.series.map((series, index) => {
        const color = colorOf(single ? index : unit.color);
        const name = single ? series.label : this.chart.series.length === 1 ? unit.label : `${unit.label} · ${series.label}`;
        return {...unitCurve(unit, series), color, name, dash: single ? [] : DASHES[index % 4]};
      })).filter((curve) => curve.x.length);
      for (const [index, line] of (this.chart.lines ?? []).entries()) {
        for (const unit of units) {
          const {x, y} = curveOf(unit.runs[0], line.name);
          const color = single ? css(index ? "--muted" : "--ink") : colorOf(unit.color);
          const name = single ? line.label : `${unit.label} · ${line.label}`;
          if (x.length && (single || index === 0)) curves.push({x, y, color, name, dash: DASHES[1 + index], level: true});
        }
      }
      const parts = curves.flatMap((curve) => [curve, curve.low, curve.high].filter(Boolean));
      const x = [...new Set(parts.flatMap((part) => part.x))].sort((a, b) => a - b);
      const rowOf = new Map(x.map((step, index) => [step, index]));
      const column = (steps, values) => {
        const made = Array(x.length).fill(null);
        steps.forEach((step, index) => { made[rowOf.get(step)] = values[index]; });
        return made;
      };
      const columns = [x], series = [{}], bands = [];
      const add = (steps, values, options) => {
        columns.push(column(steps, values));
        series.push({spanGaps: true, points: {show: false}, ...options});
        return columns.length - 1;
      };
      this.entries = curves.map((curve) => {
        const few = curve.x.length <= 40, mean = curve.level ? null : smooth(curve.y), indices = [];
        const points = {show: few && !curve.level, size: 5, fill: curve.color};
        if (curve.low?.x.length) {
          const high = add(curve.high.x, curve.high.y, {stroke: "transparent", width: 0});
          const low = add(curve.low.x, curve.low.y, {stroke: "transparent", width: 0});
          bands.push({series: [high, low], fill: faint(curve.color, 0.16)});
          indices.push(high, low);
        }
        const raw = add(curve.x, curve.y, {
          stroke: mean && !few ? faint(curve.color, 0.3) : curve.color, width: mean && !few ? 1 : curve.level ? 1.3 : 1.8, dash: curve.dash, points,
        });
        indices.push(raw);
        if (mean && !few) indices.push(add(curve.x, mean, {stroke: curve.color, width: 2, dash: curve.dash}));
        return {...curve, raw, indices};
      });
      for (const entry of this.entries) {
        if (this.hiddenEntries.has(entry.name)) for (const index of entry.indices) series[index].show = false;
      }
      return {columns, series, bands};
    }

    drawLegend() {
      this.legend.replaceChildren(...this.entries.map((entry) => {
        entry.value = element("b");
        const hidden = this.hiddenEntries.has(entry.name);
        const mark = swatch(entry.color);
        if (entry.dash.length) mark.classList.add("dashed");
        return element("button", {
          type: "button", class: hidden ? "off" : "", "aria-pressed": String(!hidden), title: "show or hide",
          onclick: () => {
            if (!this.hiddenEntries.delete(entry.name)) this.hiddenEntries.add(entry.name);
            this.draw();
          },
        }, mark, element("span", {}, entry.name), entry.value);
      }));
    }

    // Tells the values at the cursor, those of the last step without one.
    tell() {
      if (!this.plot || !this.entries) return;
      const index = this.plot.cursor.idx, x = this.plot.data[0];
      const step = index == null ? null : x[index];
      this.at.textContent = step == null ? "last" : `step ${step}`;
      for (const entry of this.entries) {
        if (!entry.value) continue;
        const values = this.plot.data[entry.raw];
        let place = index ?? values.length - 1;
        while (place > 0 && values[place] == null) place -= 1;
        const value = values[place];
        let text = number(value);
        if (entry.low?.x.length && value != null) {
          const at = entry.low.x.indexOf(x[place]);
          if (at >= 0) text += ` (${number(entry.low.y[at])}–${number(entry.high.y[at])})`;
        }
        entry.value.textContent = text;
      }
      if (this.note) {
        const shown = unitsOf().flatMap((unit) => unit.runs);
        const told = (key) => shown.flatMap((run) => run[key].filter(([at]) => at === (step ?? run.steps.at(-1)))
          .map(([, text]) => shown.length > 1 ? `${run.label}: ${text}` : text));
        const alarms = told("alarms"), lines = [...alarms, ...(this.chart.reasons ? told("reasons") : [])];
        this.note.textContent = visible(lines.slice(0, 2).join(" · "));
        this.note.classList.toggle("alarm", alarms.length > 0);
      }
    }
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const {target, isIntersecting} of entries) {
      target.card.inView = isIntersecting;
      if (isIntersecting && target.card.stale) target.card.draw();
    }
  }, {rootMargin: "300px"});
  const sizer = new ResizeObserver((entries) => {
    for (const {target} of entries) if (target.card.inView) target.card.draw();
  });
  const watch = (card, sized) => {
    card.node.card = card;
    sized.card = card;
    watcher.observe(card.node);
    sizer.observe(sized);
    return card.node;
  };
  const redraw = () => {
    for (const card of cards) {
      card.stale = true;
      if (card.inView) card.draw();
    }
  };

  // A map of numbers: rows by columns, darker is more.
  class HeatMap {
    constructor(title, unit, map, note, scale = (value) => value) {
      Object.assign(this, {map, scale, unit, stale: true});
      this.at = element("span", {class: "at"});
      this.canvas = element("canvas", {class: "map", onmousemove: (event) => this.tell(event), onmouseleave: () => { this.at.textContent = ""; }});
      this.node = element("article", {class: "card"},
        element("header", {}, element("h3", {}, title), element("small", {}, unit), this.at), this.canvas, element("p", {class: "note"}, note));
      cards.add(this);
    }

    draw() {
      this.stale = false;
      const {rows, columns, values} = this.map;
      const width = this.canvas.parentElement.clientWidth - 24, left = 52, bottom = 24, height = 210;
      const ratio = devicePixelRatio || 1, ctx = this.canvas.getContext("2d");
      Object.assign(this.canvas, {width: width * ratio, height: height * ratio});
      Object.assign(this.canvas.style, {width: `${width}px`, height: `${height}px`});
      ctx.scale(ratio, ratio);
      const cell = {width: (width - left) / columns.length, height: (height - bottom) / rows.length};
      this.box = {left, cell};
      const most = Math.max(...values.flat().map((value) => this.scale(value ?? 0)), 1e-12);
      ctx.font = "11px system-ui, sans-serif";
      const hue = css("--c0");
      values.forEach((row, r) => row.forEach((value, c) => {
        if (value == null || value === 0) return;
        ctx.fillStyle = faint(hue, 0.06 + 0.94 * this.scale(value) / most);
        const x = Math.round(left + c * cell.width), end = Math.round(left + (c + 1) * cell.width);
        ctx.fillRect(x, (rows.length - 1 - r) * cell.height, end - x - (cell.width > 12 ? 1 : 0), cell.height - 1);
      }));
      ctx.fillStyle = css("--muted");
      ctx.textAlign = "right";
      ctx.textBaseline = "middle";
      const everyRow = Math.ceil(14 / cell.height);
      rows.forEach((label, r) => { if (r % everyRow === 0) ctx.fillText(label, left - 6, (rows.length - 0.5 - r) * cell.height); });
      ctx.textBaseline = "top";
      const everyColumn = Math.ceil(64 / cell.width);
      columns.forEach((label, c) => {
        if (c % everyColumn) return;
        ctx.textAlign = c === 0 ? "left" : "center";
        const x = left + (c === 0 ? 0 : (c + 0.5) * cell.width);
        if (x < width - 18) ctx.fillText(label, x, height - bottom + 7);
      });
    }

    tell(event) {
      const {left, cell} = this.box, {rows, columns, values} = this.map;
      const column = Math.floor((event.offsetX - left) / cell.width), row = rows.length - 1 - Math.floor(event.offsetY / cell.height);
      const value = values[row]?.[column];
      this.at.textContent = value === undefined ? "" : `${columns[column]} × ${rows[row]}: ${number(value)}`;
    }
  }

  // ---- head ----
  const headline = data.headline;
  const finalMean = (values) => {
    const count = Math.max(1, Math.round(values.length / 20)), end = values.slice(-count);
    return end.reduce((a, b) => a + b, 0) / end.length;
  };
  const passesOf = (run) => data.sections.flatMap((section) => section.charts).filter((chart) => chart.set)
    .flatMap((chart) => chart.series.map((series) => ({...series, set: chart.set})).filter((series) => run.curves[series.name]));
  const facts = (run) => {
    const reward = curveOf(run, headline.reward).y, entropy = curveOf(run, headline.entropy).y;
    const target = lastOf(run, headline.target), seconds = curveOf(run, headline.seconds).y.reduce((a, b) => a + b, 0);
    const made = [["Steps", String(run.steps.at(-1) + 1), `last step ${run.steps.at(-1)}`]];
    if (reward.length) made.push(["Reward", number(finalMean(reward)), `mean of the last 5 % · first ${number(reward[0])}`]);
    for (const series of passesOf(run)) {
      const curve = curveOf(run, series.name).y, low = series.low && lastOf(run, series.low), high = series.high && lastOf(run, series.high);
      made.push([`${series.set} ${series.label}`, number(curve.at(-1)), [low != null && `${number(low)}–${number(high)}`, `first ${number(curve[0])}`].filter(Boolean).join(" · ")]);
    }
    if (entropy.length && target) made.push(["H / H*", number(finalMean(entropy) / target), `H ${number(finalMean(entropy))}, H* ${number(target)} nats`]);
    made.push(["Alarms", String(run.alarms.length), run.alarms.length ? `first at step ${run.alarms[0][0]}` : "none"]);
    if (seconds) made.push(["Time", duration(seconds), "of all steps"]);
    return made;
  };
  const head = () => {
    if (runs.length === 1) {
      return element("div", {class: "tiles"}, facts(runs[0]).map(([label, value, note]) =>
        element("div", {class: label === "Alarms" && value !== "0" ? "tile alarm" : "tile"}, element("span", {}, label), element("b", {}, value), element("small", {}, note))));
    }
    const all = runs.map(facts), names = [...new Set(all.flatMap((row) => row.map(([label]) => label)))];
    const rows = runs.map((run, index) => {
      const box = element("input", {type: "checkbox", checked: true, onchange: () => {
        if (box.checked) hiddenRuns.delete(run); else hiddenRuns.add(run);
        redraw();
      }});
      const color = element("i", {class: "swatch", "data-color": seedsAsBand ? run.group : index});
      const values = new Map(all[index].map(([label, value, note]) => [label, [value, note]]));
      return element("tr", {}, element("th", {}, element("label", {}, box, color, run.label)),
        names.map((name) => element("td", {title: values.get(name)?.[1]}, values.get(name)?.[0] ?? "–")));
    });
    return element("div", {class: "card wide"}, element("table", {}, element("thead", {}, element("tr", {}, element("th", {}, "Run"), names.map((name) => element("th", {}, name)))), element("tbody", {}, rows)));
  };
  const recolor = () => {
    for (const mark of document.querySelectorAll("[data-color]")) mark.style.background = colorOf(Number(mark.dataset.color));
  };
  const bar = () => {
    const shown = element("output", {}, `${smoothing} %`);
    const slider = element("input", {type: "range", min: 0, max: 30, value: smoothing, "aria-label": "smoothing", oninput: () => {
      smoothing = Number(slider.value);
      shown.textContent = `${smoothing} %`;
      store("smoothing", smoothing);
      redraw();
    }});
    const seeds = element("button", {type: "button", onclick: () => {
      seedsAsBand = !seedsAsBand;
      store("seeds", seedsAsBand ? "band" : "lines");
      seeds.textContent = seedsAsBand ? "Seeds: band" : "Seeds: lines";
      document.querySelectorAll("[data-color]").forEach((mark, index) => { mark.dataset.color = seedsAsBand ? runs[index].group : index; });
      recolor();
      redraw();
    }}, seedsAsBand ? "Seeds: band" : "Seeds: lines");
    const theme = element("button", {type: "button", "aria-label": "light or dark", onclick: () => {
      setTheme(isDark() ? "light" : "dark");
      store("theme", root.dataset.theme);
      recolor();
      redraw();
    }}, "◐");
    const title = runs.length === 1 ? runs[0].label : `${runs.length} runs`;
    return element("header", {class: "bar"}, element("h1", {}, title),
      element("div", {class: "controls"},
        element("button", {type: "button", id: "new", class: "primary", hidden: true, onclick: () => location.reload()}, "New steps: redraw"),
        element("button", {type: "button", id: "unzoom", hidden: true, onclick: () => zoomTo(whole)}, "Whole run"),
        hasSeeds ? seeds : null, element("label", {}, "Smoothing", slider, shown), theme));
  };

  // ---- configuration and versions ----
  const configuration = () => {
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].sort();
    const differing = names.filter((name) => new Set(runs.map((run) => run.config[name])).size > 1);
    let all = runs.length === 1;
    const body = element("tbody");
    const search = element("input", {type: "search", placeholder: "filter, e.g. entropy", "aria-label": "filter options", oninput: () => fill()});
    const toggle = element("button", {type: "button", onclick: () => { all = !all; fill(); }});
    const fill = () => {
      toggle.textContent = all ? "Show only what differs" : `Show all ${names.length}`;
      const shown = (all ? names : differing).filter((name) => name.includes(search.value));
      body.replaceChildren(...shown.map((name) => element("tr", {class: runs.length > 1 && differing.includes(name) ? "differs" : ""},
        element("th", {}, name), runs.map((run) => element("td", {}, run.config[name] ?? "unset")))));
      if (!shown.length) body.append(element("tr", {}, element("td", {colspan: runs.length + 1}, "no such option")));
    };
    fill();
    const tools = element("div", {class: "tools"}, search, runs.length > 1 ? toggle : null,
      element("span", {}, runs.length > 1 ? `${differing.length} of ${names.length} options differ` : `${names.length} options`));
    const table = element("table", {}, element("thead", {}, element("tr", {}, element("th", {}, "option"), runs.map((run) => element("th", {}, run.label)))), body);
    const inner = element("div", {class: "card wide"}, tools, element("div", {class: "scroll tall"}, table));
    return runs.length > 1 ? inner : element("details", {}, element("summary", {}, "All options"), inner);
  };
  const versions = () => {
    const rowsOf = (key) => [...new Set(runs.flatMap((run) => Object.keys(run[key])))]
      .map((name) => element("tr", {}, element("th", {}, name), runs.map((run) => element("td", {}, run[key][name] ?? "–"))));
    return element("div", {class: "card wide"}, element("div", {class: "scroll"},
      element("table", {}, element("tbody", {}, rowsOf("facts"), rowsOf("versions"),
        element("tr", {}, element("th", {}, "launches"), runs.map((run) => element("td", {}, run.launches)))))));
  };

  // ---- the page ----
  const section = (title, ...content) => {
    const id = title.toLowerCase().replace(/[^a-z]+/g, "-");
    return element("section", {id, "data-title": title}, element("h2", {}, title), content);
  };
  const mapsOf = (key, make) => runs.filter((run) => run[key]).map((run) => watchMap(make(run, runs.length > 1 ? `, ${run.label}` : "")));
  const watchMap = (map) => watch(map, map.node);
  const start = () => {
    const sections = data.sections.map(({title, charts}) => {
      const nodes = charts.map((chart) => { const card = new Card(chart); return watch(card, card.place); });
      if (title.startsWith("Entropy")) {
        nodes.push(...mapsOf("positions", (run, suffix) => new HeatMap(`Entropy by position${suffix}`, "nats", run.positions, data.reads.positions)));
        nodes.push(...mapsOf("ledger", (run, suffix) => new HeatMap(`Difficulty ledger${suffix}`, "prompts", run.ledger,
          `${data.reads.ledger} ${run.ledger.source}: ${run.ledger.prompts} prompts; difficulty ${Object.entries(run.ledger.quantiles).map(([level, value]) => `${Number(level) * 100} % ≤ ${number(value)}`).join(", ")}`, Math.sqrt)));
      }
      const grid = element("div", {class: "grid"}, nodes);
      return section(title, title.startsWith("Other") ? element("details", {}, element("summary", {}, `${charts.length} more`), grid) : grid);
    });
    const notes = runs.flatMap((run) => [
      ...run.notes.map((note) => `${run.label}: left out: ${note}`),
      ...(run.thinned ? [`${run.label}: ${run.steps.length} steps are more than a page holds: a curve shows the lowest and the highest value of each stretch of steps`] : []),
    ]);
    const samples = window.samplesBrowser(runs, {element, visible, number, faint, css, swatch});
    sections.push(...(samples ? [section("Samples", samples)] : []), section("Configuration", configuration()), section("Versions", versions()));
    const links = element("nav", {}, sections.map((each) => element("a", {href: `#${each.id}`}, each.dataset.title)));
    document.getElementById("page").append(bar(), element("main", {}, head(), links,
      notes.length ? element("ul", {class: "notes"}, notes.map((note) => element("li", {}, note))) : null, sections));
    recolor();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { recolor(); redraw(); });
  };

  // A served page asks whether there are new steps; it redraws itself unless the reader is in the middle of something.
  const follow = () => {
    let known = null;
    const ask = async () => {
      try {
        const answer = await fetch("/state");
        const state = answer.ok ? await answer.text() : known;
        if (known !== null && state !== known) {
          const busy = document.querySelector("details.sample[open]") || !document.getElementById("unzoom").hidden;
          if (busy) document.getElementById("new").hidden = false;
          else location.reload();
        }
        known = known ?? state;
      } catch { /* the server has gone; what is drawn stays */ }
    };
    ask();
    setInterval(ask, 5000);
  };
  return {start, follow};
})();
addEventListener("DOMContentLoaded", () => {
  report.start();
  if (location.protocol.startsWith("http")) report.follow();
});

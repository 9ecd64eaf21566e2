"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const colour = (i) => `var(--s${i % 8})`;
  const single = runs.length === 1;
  const view = { by: "epoch", smooth: 0, from: null, to: null, off: new Set() };

  // What the charts show: lines of a run, each with its updates and values; `curve` lines are smoothed.
  const training = (key, scale = 1) => (run) => [{
    name: "training", updates: run.train.update || [], values: (run.train[key] || []).map((v) => (v === null ? null : v * scale)),
    curve: true, number: 2,
  }];
  const evaluations = (key) => (run) => ["raw", "ema"].filter((w) => run.evals[w]).map((weights, i) => ({
    name: weights === "ema" ? "EMA" : "raw", updates: run.evals[weights].update, values: run.evals[weights][key],
    dash: weights === "ema" && !single, number: i,
  }));
  const both = (...makers) => (run) => makers.flatMap((make) => make(run));
  const CHARTS = [
    { title: "Top-1 (%)", lines: evaluations("top1"), published: true, digits: 3, large: true },
    { title: "Loss", lines: both(training("loss"), evaluations("loss")), digits: 4, large: true },
    { title: "Top-5 (%)", lines: evaluations("top5"), digits: 3 },
    { title: "Learning rate", lines: training("lr"), digits: 3, exponent: true },
    { title: "Gradient norm", lines: training("grad_norm"), digits: 3 },
    { title: "Images per second", lines: training("images_per_s"), digits: 1, zero: true, large: true },
    { title: "Time spent waiting for data (%)", lines: training("data_share", 100), digits: 1, zero: true, large: true },
  ];

  function make(tag, attributes = {}, parent = null) {
    const element = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (parent) parent.append(element);
    return element;
  }

  function ticks(low, high, wanted) {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return { found, step };
  }

  const short = (value, step, exponent = false) => {
    if (Math.abs(value) < step * 1e-6) return "0";
    if (exponent) return (+value.toPrecision(6)).toExponential();
    if (Math.abs(value) >= 1e5) return `${+(value / 1000).toPrecision(6)}k`;
    if (step < 1e-4) return (+value.toPrecision(6)).toExponential();
    return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  };

  function smoothed(values, weight) {
    let mean = 0, debias = 1;
    return values.map((v) => {
      if (v === null) return null;
      mean = weight * mean + (1 - weight) * v;
      debias *= weight;
      return mean / (1 - debias);
    });
  }

  const place = (run, update) => (view.by === "epoch" && run.updates_per_epoch ? update / run.updates_per_epoch : update);

  function linesOf(chart) {
    const found = runs.flatMap((run, i) => chart.lines(run).map((line) => ({
      ...line, run, label: single ? line.name : `${run.name}, ${line.name}`, colour: colour(single ? line.number : i),
      dash: line.dash || (!single && line.curve && chart.title === "Loss" ? "dots" : ""),
    })));
    const kinds = new Set(found.map((line) => line.name));
    return found.filter((line) => line.updates.length).map((line) => ({
      ...line,
      label: kinds.size === 1 && !single ? line.run.name : line.label,
      xs: line.updates.map((u) => place(line.run, u)),
      ys: line.curve && view.smooth ? smoothed(line.values, view.smooth) : line.values,
    }));
  }

  function path(xs, ys, x, y) {
    let text = "", pen = "M";
    ys.forEach((v, i) => {
      if (v === null) { pen = "M"; return; }
      text += `${pen}${x(xs[i]).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = "L";
    });
    return text;
  }

  const dashes = { true: "6 4", dots: "1.5 4" };

  function legend(chart, lines, box) {
    box.hidden = single && lines.length === 1;
    box.replaceChildren(...lines.map((line) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = view.off.has(line.label) ? "off" : "";
      const mark = make("svg", { viewBox: "0 0 18 8", "aria-hidden": "true" });
      make("line", { x1: 0, x2: 18, y1: 4, y2: 4, style: `stroke:${line.colour};stroke-width:3`, "stroke-dasharray": dashes[line.dash] || "" }, mark);
      button.append(mark, line.label);
      button.onclick = () => { view.off.has(line.label) ? view.off.delete(line.label) : view.off.add(line.label); drawAll(); };
      return button;
    }));
  }

  function draw(chart) {
    const { svg, tip } = chart;
    const all = linesOf(chart);
    legend(chart, all, chart.legend);
    chart.none.hidden = all.length > 0;
    svg.style.display = all.length ? "" : "none";
    if (!all.length) return;
    const lines = all.filter((line) => !view.off.has(line.label));
    const width = Math.max(chart.card.clientWidth - 24, 240), height = Math.round(Math.min(chart.large ? 300 : 230, Math.max(190, width * 0.5)));
    const published = chart.published ? runs.filter((run) => run.published).map((run) => run.published) : [];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    svg.replaceChildren();

    const from = view.from ?? 0, to = view.to ?? (Math.max(...runs.map((run) => place(run, run.last))) || 1);
    const seen = [];
    for (const line of lines) {
      line.xs.forEach((at, i) => {
        if (at < from || at > to || line.ys[i] === null) return;
        seen.push(line.ys[i]);
        if (line.curve && view.smooth && i > line.xs.length * 0.02) seen.push(line.values[i]);
      });
    }
    let [low, high] = [...seen, ...published].reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    if (!Number.isFinite(low)) { low = 0; high = 1; }
    if (chart.zero) low = Math.min(low, 0);
    if (high === low) { high += Math.abs(high) * 0.05 || 1; low -= chart.zero ? 0 : Math.abs(low) * 0.05; }
    const pad = (high - low) * 0.05;
    high += pad; low -= chart.zero ? 0 : pad;

    const yt = ticks(low, high, Math.max(3, height / 55)), xt = ticks(from, to, Math.max(3, width / 90));
    const texts = yt.found.map((v) => short(v, yt.step, chart.exponent));
    const left = 10 + 6.4 * Math.max(...texts.map((t) => t.length)), right = 14, top = 8, bottom = 22;
    const x = (v) => left + ((v - from) / (to - from)) * (width - left - right);
    const y = (v) => top + (1 - (v - low) / (high - low)) * (height - top - bottom);
    const axis = make("g", { class: "axis" }, svg);
    yt.found.forEach((v, i) => {
      make("line", { class: "rule", x1: left, x2: width - right, y1: y(v), y2: y(v) }, axis);
      make("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, axis).textContent = texts[i];
    });
    xt.found.forEach((v) => {
      make("text", { x: x(v), y: height - 5, "text-anchor": "middle" }, axis).textContent = short(v, xt.step);
    });
    make("line", { class: "base", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }, axis);

    const clip = `clip-${CHARTS.indexOf(chart)}`;
    make("rect", { x: left, y: 0, width: width - left - right + 5, height: height - bottom + 1 }, make("clipPath", { id: clip }, svg));
    const inside = make("g", { "clip-path": `url(#${clip})` }, svg);
    for (const value of new Set(published)) {
      make("line", { class: "published", x1: left, x2: width - right, y1: y(value), y2: y(value) }, inside);
      make("text", { class: "published-label", x: left + 6, y: y(value) - 5 }, inside).textContent = `published ${value}`;
    }
    for (const line of lines) {
      const style = `stroke:${line.colour}`;
      if (line.curve && view.smooth) make("path", { class: "faint", d: path(line.xs, line.values, x, y), style }, inside);
      make("path", { d: path(line.xs, line.ys, x, y), style, "stroke-dasharray": dashes[line.dash] || "" }, inside);
      if (!line.curve && line.xs.length <= 40) {
        line.ys.forEach((v, i) => {
          if (v !== null) make("circle", { class: "dot", cx: x(line.xs[i]), cy: y(v), r: 3.2, style: `fill:${line.colour}` }, inside);
        });
      }
    }
    chart.scale = { x, y, from, to, left, right, width, height, bottom, lines };
    chart.marks = make("g", {}, svg);
    tip.hidden = true;
  }

  const nearest = (xs, wanted) => {
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < wanted) a = m; else b = m; }
    return Math.abs(xs[a] - wanted) <= Math.abs(xs[b] - wanted) ? a : b;
  };

  function point(chart, px, py) {
    const s = chart.scale;
    const wanted = s.from + ((px - s.left) / (s.width - s.left - s.right)) * (s.to - s.from);
    const reach = (s.to - s.from) * 0.04; // a line that ended long before has nothing to say
    const rows = s.lines.map((line) => ({ line, i: nearest(line.xs, wanted) })).filter(({ line, i }) => {
      const inside = wanted >= line.xs[0] && wanted <= line.xs[line.xs.length - 1];
      return line.values[i] !== null && (inside || Math.abs(line.xs[i] - wanted) < reach);
    });
    chart.marks.replaceChildren();
    if (!rows.length) { chart.tip.hidden = true; return; }
    const at = rows.reduce((best, row) => {
      const gap = Math.abs(row.line.xs[row.i] - wanted);
      return gap < best.gap ? { gap, x: row.line.xs[row.i], update: row.line.updates[row.i], run: row.line.run } : best;
    }, { gap: Infinity });
    make("line", { class: "cursor", x1: s.x(at.x), x2: s.x(at.x), y1: 8, y2: s.height - s.bottom }, chart.marks);
    const table = document.createElement("table");
    const epoch = at.run.updates_per_epoch ? `epoch ${(at.update / at.run.updates_per_epoch).toFixed(2).replace(/\.?0+$/, "")}, ` : "";
    table.createCaption().textContent = `${epoch}update ${at.update}`;
    table.caption.className = "soft";
    for (const { line, i } of rows) {
      make("circle", { class: "dot", cx: s.x(line.xs[i]), cy: s.y(line.ys[i]), r: 4, style: `fill:${line.colour}` }, chart.marks);
      const row = table.insertRow(), name = row.insertCell(), value = row.insertCell();
      const mark = document.createElement("span");
      mark.className = "name";
      mark.style.background = line.colour;
      name.append(mark, line.label);
      value.textContent = chart.exponent ? line.values[i].toExponential(chart.digits) : line.values[i].toFixed(chart.digits);
    }
    chart.tip.replaceChildren(table);
    chart.tip.hidden = false;
    const box = chart.svg.getBoundingClientRect(), card = chart.card.getBoundingClientRect();
    const room = card.width, offset = box.left - card.left + px;
    chart.tip.style.left = `${offset + chart.tip.offsetWidth + 24 > room ? Math.max(4, offset - chart.tip.offsetWidth - 14) : offset + 14}px`;
    chart.tip.style.top = `${box.top - card.top + Math.min(py + 10, 90)}px`;
  }

  function listen(chart) {
    const where = (event) => {
      const box = chart.svg.getBoundingClientRect();
      return [(event.clientX - box.left) * (chart.scale.width / box.width), event.clientY - box.top];
    };
    let start = null, windowed = null;
    chart.svg.onpointerdown = (event) => {
      if (event.pointerType === "mouse") { [start] = where(event); chart.svg.setPointerCapture(event.pointerId); }
      else point(chart, ...where(event));
    };
    chart.svg.onpointermove = (event) => {
      const [px, py] = where(event);
      point(chart, px, py);
      if (start === null || Math.abs(px - start) < 6) return;
      windowed = [Math.min(px, start), Math.max(px, start)];
      make("rect", { class: "window", x: windowed[0], width: windowed[1] - windowed[0], y: 8, height: chart.scale.height - 30 }, chart.marks);
    };
    chart.svg.onpointerup = () => {
      if (windowed) {
        const s = chart.scale, back = (px) => s.from + ((px - s.left) / (s.width - s.left - s.right)) * (s.to - s.from);
        [view.from, view.to] = [Math.max(0, back(windowed[0])), Math.min(s.to, back(windowed[1]))];
        drawAll();
      }
      start = windowed = null;
    };
    chart.svg.onpointerleave = () => { if (start === null) { chart.marks.replaceChildren(); chart.tip.hidden = true; } };
    chart.svg.ondblclick = () => { view.from = view.to = null; drawAll(); };
  }

  function drawAll() {
    for (const chart of CHARTS) draw(chart);
    document.getElementById("whole").hidden = view.from === null;
  }

  const area = document.getElementById("charts");
  for (const chart of CHARTS) {
    chart.card = document.createElement("section");
    chart.card.className = chart.large ? "card chart large" : "card chart";
    const title = document.createElement("h3");
    title.textContent = chart.title;
    chart.legend = document.createElement("div");
    chart.legend.className = "legend";
    chart.svg = make("svg", { role: "img", "aria-label": chart.title });
    chart.tip = document.createElement("div");
    chart.tip.className = "tip";
    chart.tip.hidden = true;
    chart.none = document.createElement("p");
    chart.none.className = "none";
    chart.none.textContent = chart.title.startsWith("Top") ? "not evaluated yet" : "not logged yet";
    chart.card.append(title, chart.legend, chart.none, chart.svg, chart.tip);
    area.append(chart.card);
    listen(chart);
  }
  for (const button of document.querySelectorAll("[data-by]")) {
    button.onclick = () => {
      view.by = button.dataset.by;
      view.from = view.to = null;
      for (const other of document.querySelectorAll("[data-by]")) other.setAttribute("aria-pressed", String(other === button));
      drawAll();
    };
  }
  const slider = document.getElementById("smooth");
  const points = Math.max(...runs.map((run) => (run.train.update || []).length));
  slider.value = points > 400 ? 90 : points > 80 ? 70 : 0;
  view.smooth = slider.value / 100;
  slider.oninput = () => { view.smooth = slider.value / 100; drawAll(); };
  document.getElementById("whole").onclick = () => { view.from = view.to = null; drawAll(); };
  for (const figure of document.querySelectorAll("figure.zooms")) figure.onclick = () => figure.classList.toggle("large");
  const root = document.documentElement;
  document.getElementById("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; };
  let drawn = 0;
  new ResizeObserver(() => {
    if (area.clientWidth === drawn) return;
    drawn = area.clientWidth;
    requestAnimationFrame(drawAll);
  }).observe(area);
  drawAll();
})();

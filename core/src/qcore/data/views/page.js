"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const HEIGHT = 52, MOST = 20000;
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;
  const { samples, whys, sources, formats, thumbs, meta } = data;
  const findings = new Map();
  for (const one of data.findings) {
    if (!findings.has(one.row)) findings.set(one.row, []);
    findings.get(one.row).push(one);
  }
  const RANK = { error: 0, warning: 1, note: 2 };

  // An entry of the list: a sample, or a refused row, which has none.
  const entries = samples.map((s) => ({
    row: s[0], sample: s[1], source: s[2], format: s[3], place: s[4], tokens: s[5], trained: s[6],
    spans: s[7], media: s[8], share: s[5] ? (100 * s[6]) / s[5] : 0, text: null,
  }));
  const shown = new Set(entries.map((e) => e.row));
  for (const [row, list] of findings) {
    if (row && !shown.has(row) && list.some((f) => f.refused)) {
      entries.push({ row, sample: 0, source: list[0].source, format: -1, place: list[0].place,
        tokens: 0, trained: 0, spans: [], media: [], share: 0, text: null });
    }
  }
  entries.sort((a, b) => a.row - b.row || a.sample - b.sample);
  let picked = entries.map((_, n) => n), at = -1, span = -1;

  const text = (e) => {
    if (e.text === null) {
      const said = e.spans.map((s) => s[0]).join("");
      e.text = (said || (findings.get(e.row) || []).map((f) => f.message).join(" ")).toLowerCase();
    }
    return e.text;
  };
  const make = (name, className, content) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  };
  const visible = (s) => s.replace(HIDDEN, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  const number = (n) => n.toLocaleString("en-US");

  // -- the list: only the items that are on the screen exist

  function draw() {
    const list = $("list"), top = list.scrollTop, high = list.clientHeight || 600;
    const first = Math.max(0, Math.floor(top / HEIGHT) - 6);
    const last = Math.min(picked.length, Math.ceil((top + high) / HEIGHT) + 6);
    $("spacer").style.height = Math.max(picked.length * HEIGHT, 1) + "px";
    const window_ = $("window");
    window_.style.top = first * HEIGHT + "px";
    window_.replaceChildren();
    if (!picked.length) window_.append(make("div", "empty", "No sample fits the search and filters."));
    for (let n = first; n < last; n++) window_.append(item(n));
  }

  function item(n) {
    const e = entries[picked[n]], node = make("div", "item"), head = make("div", "top");
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", String(n === at));
    node.setAttribute("aria-posinset", String(n + 1));
    node.setAttribute("aria-setsize", String(picked.length));
    head.append(make("b", "", "row " + e.row + (e.sample ? "." + e.sample : "")));
    const worst = (findings.get(e.row) || []).map((f) => f.severity).sort((a, b) => RANK[a] - RANK[b])[0];
    if (worst) head.append(make("span", "dot " + worst));
    const share = make("span", "share");
    if (e.sample) {
      const meter = make("span", "meter"), fill = make("span");
      fill.style.width = e.share + "%";
      meter.append(fill);
      share.append(document.createTextNode(number(e.tokens) + " tokens"), meter,
        document.createTextNode(Math.round(e.share) + " %"));
    } else share.append(document.createTextNode("left out"));
    head.append(share);
    const spans = e.spans;
    const from = spans.find((s) => s[3] && whys[s[2]] === "answer") || spans.find((s) => s[3]) || spans[0];
    const said = from ? from[0] : (findings.get(e.row) || [{ message: "" }])[0].message;
    node.append(head, make("div", "start", visible(said.slice(0, 120).replace(/\s+/g, " "))));
    node.addEventListener("click", () => select(n));
    return node;
  }

  function select(n) {
    if (!picked.length) { at = -1; detail(null); draw(); return; }
    at = Math.min(Math.max(n, 0), picked.length - 1);
    const list = $("list"), top = at * HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
    detail(entries[picked[at]]);
    draw();
  }

  // -- one sample

  const tokens = [...meta.special, ...meta.media].sort((a, b) => b.length - a.length);
  const media = new Set(meta.media);
  const escape = (s) => s.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const splitter = tokens.length ? new RegExp("(" + tokens.map(escape).join("|") + ")") : null;

  function pieces(parent, said) {
    for (const part of splitter ? said.split(splitter) : [said]) {
      if (!part) continue;
      if (tokens.includes(part)) parent.append(make("span", media.has(part) ? "medium" : "special", part));
      else plain(parent, part);
    }
  }

  function plain(parent, said) {
    let from = 0;
    for (const found of said.matchAll(/\n|[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g)) {
      parent.append(document.createTextNode(said.slice(from, found.index)));
      from = found.index + 1;
      if (found[0] === "\n") parent.append(make("span", "mark", "↵"), document.createTextNode("\n"));
      else parent.append(make("span", "hidden", visible(found[0])));
    }
    parent.append(document.createTextNode(said.slice(from)));
  }

  function detail(e) {
    for (const id of ["head", "notes", "media", "text"]) $(id).replaceChildren();
    span = -1;
    why(null);
    $("detail").scrollTop = 0;
    if (!e) return;
    $("head").append(make("b", "", "Row " + e.row + (e.sample ? ", sample " + e.sample : ", left out")),
      document.createTextNode(" · " + visible(sources[e.source] || "") + " " + e.place +
        (e.format >= 0 ? " · " + formats[e.format] : "") +
        (e.sample ? " · " + number(e.tokens) + " tokens, " + number(e.trained) + " trained (" +
          Math.round(e.share) + " %)" : "")));
    for (const f of findings.get(e.row) || []) $("notes").append(finding(f));
    for (const [name, thumb] of e.media) {
      const figure = make("figure");
      if (thumb >= 0) {
        const image = make("img");
        image.alt = "";
        image.src = thumbs[thumb];
        figure.append(image);
      }
      figure.append(make("figcaption", "", visible(name)));
      $("media").append(figure);
    }
    e.spans.forEach((s, n) => {
      const node = make("span", s[3] ? "on" : "off");
      pieces(node, s[0].length > MOST ? s[0].slice(0, MOST) : s[0]);
      if (s[0].length > MOST) {
        const more = make("button", "", "show " + number(s[0].length - MOST) + " more characters");
        more.type = "button";
        more.addEventListener("click", () => { more.remove(); pieces(node, s[0].slice(MOST)); });
        node.append(more);
      }
      node.addEventListener("mouseenter", () => why(e, n));
      node.addEventListener("mouseleave", () => why(span < 0 ? null : e, span));
      node.addEventListener("click", () => pick(e, n));
      $("text").append(node);
    });
  }

  function finding(f) {
    const li = make("li", f.severity);
    li.append(make("code", "", f.code),
      document.createTextNode(" " + (f.field ? visible(f.field) + ": " : "") + visible(f.message)));
    if (f.fix) li.append(make("span", "fix", ". Fix: " + visible(f.fix)));
    return li;
  }

  function pick(e, n) {
    span = n;
    [...$("text").children].forEach((node, k) => node.classList.toggle("pick", k === n));
    why(e, n);
  }

  function why(e, n) {
    if (!e) { $("why").textContent = "Point at or click text to see why it is trained or not."; return; }
    const s = e.spans[n];
    let start = 0;
    for (let k = 0; k < n; k++) start += e.spans[k][1];
    $("why").textContent = (s[3] ? "Trained: " : "Not trained: ") + whys[s[2]] + " · tokens " +
      number(start) + " to " + number(start + s[1] - 1) + " (" + number(s[1]) + ")";
  }

  function step(by) {
    if (at < 0) return;
    const e = entries[picked[at]];
    for (let n = span + by; n >= 0 && n < e.spans.length; n += by) {
      if (e.spans[n][3]) {
        pick(e, n);
        $("text").children[n].scrollIntoView({ block: "nearest" });
        return;
      }
    }
  }

  // -- search and filters

  function filter() {
    const wanted = $("search").value.toLowerCase();
    const format = $("format").value, code = $("finding").value, source = $("source").value;
    const low = Number($("low").value || 0), high = Number($("high").value || 100);
    const kept = at >= 0 ? picked[at] : -1;
    picked = [];
    entries.forEach((e, n) => {
      if (source !== "" && e.source !== Number(source)) return;
      if (format !== "" && e.format !== Number(format)) return;
      const list = findings.get(e.row) || [];
      if (code === "*" ? !list.length : code === "-" ? list.length : code && !list.some((f) => f.code === code)) return;
      if ((low > 0 || high < 100) && (!e.sample || e.share < low || e.share > high)) return;
      if (wanted && !text(e).includes(wanted)) return;
      picked.push(n);
    });
    $("count").textContent = number(picked.length) + " of " + number(entries.length);
    $("list").scrollTop = 0;
    const back = picked.indexOf(kept);
    select(back < 0 ? 0 : back);
  }

  function options(id, first, pairs) {
    for (const [value, label] of [["", first], ...pairs]) {
      const option = make("option", "", label);
      option.value = value;
      $(id).append(option);
    }
    $(id).addEventListener("change", filter);
    if (pairs.length < 2 && id !== "finding") $(id).hidden = true;
  }

  const codes = new Map();
  for (const f of data.findings) if (f.row) codes.set(f.code, (codes.get(f.code) || 0) + 1);
  options("source", "All sources", sources.map((name, n) => [n, visible(name)]));
  options("format", "All formats", formats.map((name, n) => [n, name]));
  options("finding", "All findings", [["*", "with a finding"], ["-", "without a finding"],
    ...[...codes].map(([code, n]) => [code, code + " (" + number(n) + ")"])]);

  const summary = $("summary");
  const fact = (n, unit) => summary.append(make("b", "", number(n)), document.createTextNode(" " + (n === 1 ? unit.replace(/s$/, "") : unit) + " · "));
  summary.append(make("b", "", visible(meta.model)), document.createTextNode(" · "));
  fact(meta.rows, "rows");
  if (meta.rejected) fact(meta.rejected, "refused");
  fact(samples.length, "samples");
  fact(meta.tokens, "tokens");
  summary.append(make("b", "", (meta.tokens ? Math.round((100 * meta.supervised) / meta.tokens) : 0) + " %"),
    document.createTextNode(" trained" + (meta.left ? " · " + meta.left : "")));
  const general = findings.get(0) || [];
  $("general").hidden = !general.length;
  $("general").firstElementChild.textContent =
    general.length + (general.length > 1 ? " findings" : " finding") + " on all rows";
  general.forEach((f) => $("all").append(finding(f)));

  let wait = 0;
  const later = () => { clearTimeout(wait); wait = setTimeout(filter, 120); };
  for (const id of ["search", "low", "high"]) $(id).addEventListener("input", later);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("list").addEventListener("scroll", () => requestAnimationFrame(draw));
  addEventListener("resize", draw);
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  addEventListener("keydown", (event) => {
    const typing = event.target instanceof Element && event.target.matches("input, select");
    if (typing) {
      if (event.key === "Escape") { event.target.blur(); $("list").focus(); }
      return;
    }
    if (event.target instanceof Element && event.target.matches("summary, button") && event.key.length > 1) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor($("list").clientHeight / HEIGHT) - 1);
    const moves = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    if (event.key in moves) select(at + moves[event.key]);
    else if (event.key === "]" || event.key === "[") step(event.key === "]" ? 1 : -1);
    else if (event.key === "/") $("search").focus();
    else return;
    event.preventDefault();
  });
  filter();
  document.body.dataset.ready = "yes";
})();

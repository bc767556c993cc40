// The samples browser: rows by reason, reward or entropy; a row opens into prompt and completion, tokens by entropy.
"use strict";
window.samplesBrowser = (runs, {element, visible, number, faint, css}) => {
  const rows = runs.flatMap((run) => (run.samples?.rows ?? []).map((row) => ({...row, run})));
  if (!rows.length) return null;
  const PAGE = 40, OF_A_REASON = 6;
  const most = Math.max(...rows.map((row) => row.reward ?? 0));
  const paid = (row) => most > 0 && row.reward === most;
  // A gold that is missing tells something only where right answers of the set repeat it: those of countdown do not.
  const repeatsGold = new Map([...new Set(rows.map((row) => row.set))].map((name) => {
    const right = rows.filter((row) => row.set === name && paid(row));
    return [name, right.filter((row) => !row.answer_absent).length > right.length / 2];
  }));
  // What makes a reader look twice: it was paid, and what it was paid for is not there.
  const doubts = (row) => paid(row) ? [
    row.boxed !== null && !row.boxed.trim() ? "paid for an empty box" : null,
    row.answer_absent && repeatsGold.get(row.set) ? "paid, gold is not in the text" : null,
    !row.tokens.join("").trim() ? "paid for nothing" : null,
  ].filter(Boolean).slice(0, 1) : [];
  const doubtful = (row) => doubts(row).length ? 1 : 0;
  const ORDERS = {
    "by reason": (a, b) => a.reason.localeCompare(b.reason) || doubtful(b) - doubtful(a) || b.step - a.step,
    "best first": (a, b) => b.reward - a.reward || b.step - a.step,
    "worst first": (a, b) => a.reward - b.reward || b.step - a.step,
    "most uncertain first": (a, b) => (b.mean_entropy ?? -1) - (a.mean_entropy ?? -1),
    "newest first": (a, b) => b.step - a.step,
  };
  const choice = (label, values) => {
    const made = element("select", {"aria-label": label, onchange: () => fill()}, values.map(([value, text]) => element("option", {value}, text)));
    return made;
  };
  const distinct = (of) => [...new Set(rows.map(of))].sort();
  const total = (reason) => runs.reduce((sum, run) => sum + (run.samples?.reasons[reason] ?? 0), 0);
  const order = choice("order", Object.keys(ORDERS).map((name) => [name, name]));
  const reason = choice("reason", [["", "every reason"], ...distinct((row) => row.reason).map((name) => [name, `${name} (${total(name)})`])]);
  const set = choice("set", [["", "every set"], ...distinct((row) => row.set).map((name) => [name, name])]);
  const run = choice("run", [["", "every run"], ...runs.map((each, index) => [String(index), each.label])]);
  const search = element("input", {type: "search", placeholder: "text in it", "aria-label": "text in prompt or completion", oninput: () => fill()});
  const onlyDoubtful = element("input", {type: "checkbox", onchange: () => fill()});
  const numDoubtful = rows.filter(doubtful).length;
  const list = element("div", {class: "samples"}), counted = element("span", {class: "count"});

  const tokens = (row) => {
    const scale = Math.max(...row.entropy.map((value) => value ?? 0), 1e-6), hue = css("--heat");
    return element("pre", {class: "tokens"}, row.tokens.map((text, index) => {
      const value = row.entropy[index];
      const made = element("span", {title: value == null ? null : `${number(value)} nats`}, text);
      if (value != null) made.style.background = faint(hue, Math.min(0.85, value / scale * 0.85));
      return made;
    }));
  };
  const fact = (label, value) => value == null ? null : element("span", {class: "fact"}, `${label} `, element("b", {}, value));
  const opened = (row) => [
    element("div", {class: "facts"}, fact("prompt", row.prompt_id), fact("group", row.group), fact("advantage", row.advantage == null ? null : number(row.advantage)),
      fact("difficulty", row.difficulty == null ? null : number(row.difficulty)), fact("entropy weight", row.entropy_weight == null ? null : number(row.entropy_weight)),
      fact("policy version", row.version), fact("tokens", row.tokens.length)),
    element("h4", {}, "Prompt"), element("pre", {}, row.prompt), element("h4", {}, row.mean_entropy == null ? "Completion" : "Completion, tokens by entropy"), tokens(row),
  ];
  const item = (row) => {
    const box = row.boxed === null ? null : element("span", {class: "fact"}, "box ", element("b", {class: row.boxed.trim() ? "" : "empty"}, row.boxed.trim() ? row.boxed : "empty"));
    const made = element("details", {class: "sample"}, element("summary", {},
      element("div", {class: "line"},
        element("span", {class: paid(row) ? "chip good" : "chip bad"}, `reward ${number(row.reward)}`), element("span", {class: "chip"}, row.reason),
        doubts(row).map((doubt) => element("span", {class: "chip doubt"}, doubt)), row.truncated ? element("span", {class: "chip"}, "cut") : null,
        element("span", {class: "fact"}, `step ${row.step} · ${row.set}`), runs.length > 1 ? element("span", {class: "fact"}, row.run.label) : null,
        fact("gold", row.answer || null), box, row.mean_entropy == null ? null : fact("H", number(row.mean_entropy))),
      element("div", {class: "end"}, row.end.trim() ? row.end : "(empty)")));
    made.addEventListener("toggle", () => { if (made.open && made.childElementCount === 1) made.append(...opened(row)); });
    return made;
  };
  const heading = (name, shown) => {
    const paidShare = shown.filter(paid).length / shown.length;
    return element("h3", {class: "reason"}, name, element("small", {}, ` ${total(name)} samples, ${shown.length} here, ${number(Math.round(paidShare * 100))} % of these paid in full`));
  };
  let limit = PAGE;
  const fill = (keep = false) => {
    if (!keep) limit = PAGE;
    const text = search.value.toLowerCase();
    const found = rows.filter((row) => (!reason.value || row.reason === reason.value) && (!set.value || row.set === set.value)
      && (!run.value || row.run === runs[Number(run.value)]) && (!onlyDoubtful.checked || doubtful(row))
      && (!text || `${row.prompt}\n${row.tokens.join("")}`.toLowerCase().includes(text)));
    const grouped = order.value === "by reason";
    // reasons with something doubtful come first
    const alarming = new Map(distinct((row) => row.reason).map((name) => [name, rows.filter((row) => row.reason === name && doubtful(row)).length]));
    found.sort(grouped ? (a, b) => alarming.get(b.reason) - alarming.get(a.reason) || ORDERS[order.value](a, b) : ORDERS[order.value]);
    const nodes = [], more = (text, onclick) => nodes.push(element("button", {type: "button", onclick}, text));
    if (grouped && !reason.value) {
      for (const name of new Set(found.map((row) => row.reason))) {
        const own = found.filter((row) => row.reason === name);
        nodes.push(heading(name, own), ...own.slice(0, OF_A_REASON).map(item));
        if (own.length > OF_A_REASON) more(`${own.length - OF_A_REASON} more`, () => { reason.value = name; fill(); });
      }
    } else {
      if (grouped && found.length) nodes.push(heading(reason.value, found));
      nodes.push(...found.slice(0, limit).map(item));
      if (found.length > limit) more(`${found.length - limit} more`, () => { limit += PAGE; fill(true); });
    }
    list.replaceChildren(...(nodes.length ? nodes : [element("p", {class: "note"}, "no sample fits")]));
    const all = runs.reduce((sum, each) => sum + (each.samples?.total ?? 0), 0);
    counted.textContent = `${found.length} of ${all} samples: the best, the worst, the most uncertain and the newest of each reason are kept in this page`;
  };
  fill();
  const doubtBox = numDoubtful ? element("label", {class: "doubtbox"}, onlyDoubtful, `only doubtful (${numDoubtful})`) : null;
  return element("div", {}, element("div", {class: "tools"}, order, reason, set, runs.length > 1 ? run : null, search, doubtBox), element("p", {class: "note"}, counted), list);
};

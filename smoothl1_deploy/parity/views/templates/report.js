// The page works without this: links open panels. Here: focus, Esc, arrow keys, the current cell.
"use strict";
(() => {
  let opener = null;
  const links = (id) => document.querySelectorAll(`a[href="#${CSS.escape(id)}"]`);
  const open = () => document.querySelector(".panel:target");

  const mark = () => {
    document.querySelectorAll("a[aria-current]").forEach((a) => a.removeAttribute("aria-current"));
    const panel = open();
    if (panel) {
      links(panel.id).forEach((a) => a.setAttribute("aria-current", "true"));
      panel.focus({ preventScroll: true });
    } else if (opener) {
      opener.focus({ preventScroll: true });
      opener = null;
    }
  };

  addEventListener("hashchange", mark);
  addEventListener("click", (event) => {
    const link = event.target.closest("a.place, .red-list a");
    if (link) opener = link;
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && open()) {
      location.hash = "closed";
      return;
    }
    const at = event.target.closest ? event.target.closest("td") : null;
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!at || !event.target.matches("a.place") || !(event.key in step)) return;
    const [down, right] = step[event.key];
    const rows = at.parentElement.parentElement.rows;
    const row = rows[at.parentElement.sectionRowIndex + down];
    const next = row && row.cells[at.cellIndex + right]?.querySelector("a.place");
    if (next) {
      next.focus();
      event.preventDefault();
    }
  });
  mark();
})();

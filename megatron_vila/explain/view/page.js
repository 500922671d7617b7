"use strict";
(() => {
  const pieces = JSON.parse(document.getElementById("pieces").textContent);
  const tip = document.getElementById("tip");
  let at = null;

  const named = (id) => (id in pieces ? `${id} ${pieces[id]}` : id);

  // What is told of the tokens of an element: mostly one, several where only together they write a character.
  function lines(element) {
    const trained = element.closest("mark") !== null;
    const kind = element.classList.contains("control") ? "control token" : "text";
    return element.dataset.t.split(",").flatMap((token) => {
      const [place, id, label] = token.split(" ");
      return [
        ["token", named(id)],
        ["place", place],
        ["kind", trained ? `${kind}, trained: the model learns to write it` : `${kind}, not trained`],
        ["label", label ? `${named(label)}, to be predicted here` : "none: nothing to predict here"],
      ];
    });
  }

  function show(token) {
    if (token === at) return;
    hide();
    at = token;
    at.classList.add("at");
    tip.replaceChildren(
      ...lines(token).map((line) => {
        const row = document.createElement("div");
        row.className = line[0] === "token" ? "first" : "";
        row.append(...line.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
        return row;
      }),
    );
    tip.hidden = false;
    place();
  }

  // Beside the token, wherever it is now; nowhere once it has been scrolled away.
  function place() {
    if (at === null) return;
    const box = at.getClientRects()[0];
    const seen = at.closest(".strip").getBoundingClientRect();
    const highest = Math.max(0, seen.top);
    const lowest = Math.min(window.innerHeight, seen.bottom);
    tip.hidden = box.bottom < highest || box.top > lowest;
    const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${below + tip.offsetHeight < window.innerHeight ? below : box.top - tip.offsetHeight - 6}px`;
  }

  function hide() {
    if (at !== null) at.classList.remove("at");
    at = null;
    tip.hidden = true;
  }

  const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".strip i") : null);

  // A page that scrolls under a pointer at rest is not pointing: the keyboard may have scrolled it.
  let rest = "";
  document.addEventListener("pointermove", (event) => {
    const where = `${event.screenX} ${event.screenY}`;
    if (where === rest) return;
    rest = where;
    const token = tokenOf(event);
    if (token) show(token);
    else if (event.pointerType === "mouse") hide();
  });
  document.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) show(token);
    else hide();
    const picture = event.target instanceof Element && event.target.closest(".zoom img");
    if (picture) enlarge(picture);
  });
  document.addEventListener("scroll", place, { passive: true, capture: true });
  window.addEventListener("resize", place);

  for (const strip of document.querySelectorAll(".strip")) {
    const tokens = strip.getElementsByTagName("i");
    const places = new Map(Array.from(tokens, (token, place) => [token, place]));
    strip.addEventListener("blur", hide);
    strip.addEventListener("keydown", (event) => {
      const from = places.has(at) ? places.get(at) : -1;
      const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined || to < 0 || to >= tokens.length) return;
      event.preventDefault();
      show(tokens[to]);
      tokens[to].scrollIntoView({ block: "nearest" });
    });
  }

  function enlarge(picture) {
    const dialog = document.getElementById("large");
    const large = dialog.querySelector("img");
    large.src = picture.src;
    large.alt = dialog.querySelector("p").textContent = picture.alt;
    large.className = picture.className;
    dialog.showModal();
  }

  for (const button of document.querySelectorAll(".zoom")) {
    button.addEventListener("click", (event) => event.detail === 0 && enlarge(button.firstElementChild));
  }
})();

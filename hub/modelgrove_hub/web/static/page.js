// What a page can do better with JavaScript; all of it works without.
const root = document.documentElement;
root.classList.add("js");

// "/" goes to the search box; arrows move among results, and Enter follows the link that has the focus.
const links = () => [...document.querySelectorAll("[data-results] h3 a")];
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input, textarea, select");
  const box = document.querySelector("[data-search]");
  if (event.key === "/" && !typing && box) {
    event.preventDefault();
    box.focus();
    box.select();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const found = links();
    const place = found.indexOf(document.activeElement);
    if (!found.length || (typing && typing !== box) || (place < 0 && typing !== box)) return;
    event.preventDefault();
    const next = place + (event.key === "ArrowDown" ? 1 : -1);
    (next < 0 ? box : found[Math.min(next, found.length - 1)])?.focus();
  }
});

// Copy buttons.
addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  const said = await copy(button.dataset.copy) ? "Copied" : "Not allowed";
  const before = button.textContent;
  button.textContent = said;
  setTimeout(() => { button.textContent = before; }, 1200);
});
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // not a secure context: a hub on another machine without TLS
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// The switch of colours keeps the page where it is.
addEventListener("submit", (event) => {
  const theme = event.target.closest?.("form.theme") && event.submitter?.value;
  if (!theme) return;
  event.preventDefault();
  root.dataset.theme = theme;
  for (const button of event.target.querySelectorAll("button")) button.setAttribute("aria-pressed", button.value === theme);
  fetch("/theme", { method: "POST", body: new URLSearchParams({ theme, next: "/" }), redirect: "manual", keepalive: true });
  dispatchEvent(new Event("themechange"));
});

// What is still going on: each event says that there is something new, and the page's own HTML is taken in.
const live = document.querySelector("[data-live]");
if (live) watch(live.dataset.live, live.id);
function watch(url, id) {
  const source = new EventSource(url);
  let last = 0, waiting = 0;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(renew, Math.max(50, 400 - (Date.now() - last)));
  };
  const renew = async () => {
    last = Date.now();
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById(id);
    const before = document.getElementById(id);
    const held = before.contains(document.activeElement) ? document.activeElement : null;
    const again = held && [...before.querySelectorAll("a, button, pre")].indexOf(held);
    const log = before.querySelector(".log");
    const atEnd = log && log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
    before.replaceWith(fresh);
    if (held) [...fresh.querySelectorAll("a, button, pre")][again]?.focus();
    if (atEnd) fresh.querySelector(".log")?.scrollTo(0, 1e9);
    if (fresh.dataset.live) return;
    source.close();
    clearInterval(ticker);
  };
  for (const name of ["state", "progress", "log", "end", "job"]) source.addEventListener(name, soon);
  // Where events do not come through, as behind some proxies, it is taken in every few seconds.
  const ticker = setInterval(() => { if (source.readyState !== EventSource.OPEN) soon(); }, 3000);
}

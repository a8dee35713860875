// Draws the flow charts of a page in its colours, and draws them again when the reader changes between light and dark.
const texts = [...document.querySelectorAll(".drawing")].map((place) => [place, place.textContent.trim()]);

async function draw() {
  const isDark = document.documentElement.dataset.theme === "dark";
  mermaid.initialize({
    startOnLoad: false,
    theme: isDark ? "dark" : "neutral",
    fontFamily: "inherit",
    flowchart: { wrappingWidth: 400 },
  });
  for (const [number, [place, text]] of texts.entries()) {
    place.innerHTML = (await mermaid.render(`drawing-${number}`, text)).svg;
  }
}

let last = null;
function drawOnChange() {
  const theme = document.documentElement.dataset.theme;
  if (theme !== last) {
    last = theme;
    draw();
  }
}
new MutationObserver(drawOnChange).observe(document.documentElement, { attributeFilter: ["data-theme"] });
drawOnChange();

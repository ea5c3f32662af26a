// For the test of the pages: run in a document whose frames hold them.
const luminance = color => {
  const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map(v => {
    const c = v / 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);

function look(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, problems = [];
  const style = element => view.getComputedStyle(element);
  const ground = luminance(style(page.body).backgroundColor);
  if (page.documentElement.scrollWidth > view.innerWidth)
    problems.push(`the page is ${page.documentElement.scrollWidth} px wide`);
  const charts = [...page.querySelectorAll("svg.chart")].filter(svg => style(svg).display !== "none");
  for (const svg of charts) {
    const box = svg.getBoundingClientRect(), name = svg.closest("figure").querySelector("h3").textContent;
    if (!(box.width > 100 && box.height > 60)) problems.push(`${name}: ${box.width} x ${box.height} px`);
    if (svg.querySelectorAll("rect, path, polyline").length === 0) problems.push(`${name}: nothing is drawn`);
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect(), text]);
    for (const [text, at, element] of texts) {
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1)
        problems.push(`${name}: "${text}" lies beyond the drawing`);
      if (at.height < 9) problems.push(`${name}: "${text}" is ${at.height} px high`);
      if (!element.classList.contains("on") && contrast(luminance(style(element).fill), ground) < 4.5)
        problems.push(`${name}: "${text}" can hardly be seen`);
    }
    for (let i = 0; i < texts.length; i++)
      for (let j = i + 1; j < texts.length; j++) {
        const [a, p] = texts[i], [b, q] = texts[j];
        const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (wide > 0 && high > 2) problems.push(`${name}: "${a}" and "${b}" overlap`);
      }
    // Letters on blocks, and every series against the page.
    for (const block of svg.querySelectorAll(".bar, .stroke, .mark")) {
      const paint = style(block)[block.classList.contains("bar") ? "fill" : "stroke"];
      if (contrast(luminance(paint), ground) < 3) problems.push(`${name}: ${block.getAttribute("class")} can hardly be seen`);
    }
    for (const text of svg.querySelectorAll("text.on"))
      if (contrast(luminance(style(text).fill), luminance(style(text.previousElementSibling).fill)) < 4.5)
        problems.push(`${name}: "${text.textContent}" on its block can hardly be read`);
  }
  for (const element of page.querySelectorAll("h1, h2, h3, p, dt, dd, th, td, li, summary"))
    if (contrast(luminance(style(element).color), ground) < 4.5) problems.push(`"${element.textContent}" can hardly be read`);
  return {
    name: frame.dataset.name,
    width: view.innerWidth,
    figures: page.querySelectorAll("figure").length,
    charts: charts.length,
    loaded: view.performance.getEntriesByType("resource").length,
    brightness: ground,
    problems: [...new Set(problems)],
  };
}

addEventListener("load", () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
});

// The figure of selection.md: it draws from SELECTION, the points of selection-points.js, and trains nothing.
(() => {
  const root = document.getElementById("selection");
  const canvas = root.querySelector("canvas"), pen = canvas.getContext("2d");
  const inputs = [...root.querySelectorAll("input")], outputs = [...root.querySelectorAll("output")];
  const scales = Object.keys(SELECTION).sort((a, b) => a - b);
  const values = [scales, [1, 2, 5, 10, 20, 50, 100, 200], [0, 0.3, 1, 3, 10]];
  const [centerX, centerY, radius] = CIRCLE, chosen = 400, limit = 1.15;
  const place = (x) => ((x + limit) / (2 * limit)) * canvas.width;

  function generator(seed) { // Park and Miller's, so that the same settings give the same picture
    return () => (seed = (seed * 48271) % 2147483647) / 2147483647;
  }

  function select(points, count, factor, random) { // one of `count` candidates, with probability ~ exp(factor Q)
    const candidates = Array.from({ length: count }, () => points[Math.floor(random() * points.length)]);
    const best = Math.max(...candidates.map(([, , q]) => q));
    const weights = candidates.map(([, , q]) => Math.exp(factor * (q - best)));
    let rest = random() * weights.reduce((a, b) => a + b);
    return candidates.find((_, i) => (rest -= weights[i]) <= 0) ?? candidates[count - 1];
  }

  function dots(points, color, size) {
    pen.fillStyle = color;
    for (const [x, y] of points) {
      pen.beginPath();
      pen.arc(place(x), canvas.height - place(y), size, 0, 7);
      pen.fill();
    }
  }

  function draw() {
    const [scale, count, factor] = inputs.map((input, i) => values[i][input.value]);
    outputs.forEach((output, i) => (output.value = values[i][inputs[i].value]));
    const random = generator(1);
    const taken = Array.from({ length: chosen }, () => select(SELECTION[scale], count, factor, random));
    pen.fillStyle = "white";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = "#ffe3cc";
    pen.beginPath();
    pen.arc(place(centerX), canvas.height - place(centerY), (radius / (2 * limit)) * canvas.width, 0, 7);
    pen.fill();
    dots(SELECTION[scale], "#bbb", 2.5);
    dots(taken, "#f57c0099", 3.5);
    const pay = taken.filter(([x, y]) => Math.hypot(x - centerX, y - centerY) < radius).length / chosen;
    root.querySelector("strong").textContent = `${Math.round(100 * pay)} % of the actions taken pay`;
  }

  inputs.forEach((input) => input.addEventListener("input", draw));
  draw();
})();

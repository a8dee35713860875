// Runs two exported generators in the browser on the same noise: the reader moves the noise, and sees what both make of it.
const here = new URL(".", document.currentScript.src).href;
ort.env.wasm.wasmPaths = `${here}npm/`;
ort.env.wasm.numThreads = 1;

const [SIDE, MANY] = [8, 1000];

// Each input of an exported file is named by its site and the law of its noise, such as "z/normal".
const laws = {
  normal: () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()),
  uniform: () => (Math.random() + 2 ** -54) / (1 + 2 ** -53), // never 0 or 1
};
const arrays = { float32: Float32Array, float64: Float64Array };

async function load(name) {
  const response = await fetch(`${here}in_browser/${name}.onnx`);
  const bytes = await response.arrayBuffer();
  return { name, bytes: bytes.byteLength, session: await ort.InferenceSession.create(bytes) };
}

function drawNoise(session, rows) {
  const drawn = {};
  for (const { name, type, shape } of session.inputMetadata) {
    const sizes = shape.map((size) => (typeof size === "number" ? size : rows));
    const count = sizes.reduce((a, b) => a * b);
    const law = laws[name.split("/").pop()];
    drawn[name] = new ort.Tensor(type, arrays[type].from({ length: count }, law), sizes);
  }
  return drawn;
}

async function milliseconds(session, noise, runs) {
  const started = performance.now();
  for (let run = 0; run < runs; run += 1) await session.run(noise);
  return (performance.now() - started) / runs;
}

function paint(canvas, values) {
  const dark = values.map((value) => Math.round(255 * (1 - value)));
  const pixels = new ImageData(SIDE, SIDE);
  dark.forEach((level, place) => pixels.data.set([level, level, level, 255], 4 * place));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function element(parent, tag, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

async function start(place) {
  const models = await Promise.all(["teacher", "student"].map(load));
  const controls = element(place, "div", { className: "controls" });
  const sliders = Array.from({ length: models[0].session.inputMetadata[0].shape[1] }, (_, number) => {
    const label = element(controls, "label", { textContent: `z${number + 1}` });
    return element(label, "input", { type: "range", min: -3, max: 3, step: 0.01 });
  });
  const button = element(controls, "button", { type: "button", textContent: "New noise", className: "btn btn-primary" });
  for (const model of models) {
    const figure = element(place, "figure", { id: model.name });
    model.canvases = ["grey", "x"].map((site) =>
      element(figure, "canvas", { width: SIDE, height: SIDE, role: "img", ariaLabel: `${model.name}, ${site}` }),
    );
    model.caption = element(figure, "figcaption");
  }

  place.draw = async () => {
    for (const { session, canvases } of models) {
      const made = await session.run(place.noise);
      ["grey", "x"].forEach((site, number) => paint(canvases[number], made[site].data));
    }
  };
  async function renew() {
    place.noise = drawNoise(models[0].session, 1);
    sliders.forEach((slider, number) => (slider.value = place.noise["z/normal"].data[number]));
    sliders.forEach((slider, number) => (place.noise["z/normal"].data[number] = slider.value));
    await place.draw();
  }
  sliders.forEach((slider, number) =>
    slider.addEventListener("input", () => {
      place.noise["z/normal"].data[number] = slider.value;
      place.draw();
    }),
  );
  button.addEventListener("click", renew);
  await renew();

  const many = drawNoise(models[0].session, MANY);
  for (const { name, bytes, session, caption } of models) {
    await session.run(many);
    const [one, all] = [await milliseconds(session, place.noise, 50), await milliseconds(session, many, 3)];
    const kilobytes = (bytes / 1000).toFixed(0);
    caption.textContent = `${name}: ${kilobytes} kB, ${one.toFixed(2)} ms an image, ${all.toFixed(1)} ms for ${MANY}`;
  }
  place.dataset.state = "ready";
}

for (const place of document.querySelectorAll(".in-browser")) {
  if (location.protocol === "file:") {
    place.textContent = "Browsers load no WebAssembly from a file. Run: python -m http.server -d build/docs";
  } else {
    start(place).catch((error) => {
      place.textContent = `The student does not run in this browser: ${error.message}`;
      place.dataset.state = "failed";
    });
  }
}

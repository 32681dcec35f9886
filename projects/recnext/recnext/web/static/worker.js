// The network, beside the page: it stays at hand while this computes. A module worker, which gets
// - {about, run, cache}: what model.json says, where to compute ('webgpu', 'threads', 'single'; undefined: the best that
//   there is) and the name of the browser's cache for what is large. It answers {done, of} in bytes, then {ready: words},
//   or {failed: words}
// - {number, pixels}: RGBA of an image of the model's size. It answers {number, labels, milliseconds}, or {number, failed}

let compute = null; // from the pixels of an image to its labels

self.addEventListener('message', async ({ data }) => {
  try {
    if (data.about) await start(data);
    else await answer(data);
  } catch (error) {
    self.postMessage({ number: data.number, failed: error.message || String(error) });
  }
});

async function answer({ number, pixels }) {
  const began = performance.now();
  const labels = await compute(pixels);
  self.postMessage({ number, labels, milliseconds: performance.now() - began }, [labels.buffer]);
}

async function start({ about, run, cache }) {
  const processor = self.crossOriginIsolated ? 'threads' : 'single';
  const places = run ? [run] : await hasGpu() ? ['webgpu', processor] : [processor];
  for (const where of places) {
    const flavour = about.runtime.flavours[where === 'webgpu' ? 'webgpu' : 'wasm'];
    const [network, binary] = await load([about.model, flavour.binary], cache);
    try {
      self.postMessage({ ready: await open(about, flavour, where, network, binary) });
      return;
    } catch (error) {
      // A graphics processor that refuses the network is no reason to do without it.
      if (where === places.at(-1)) throw error;
    }
  }
}

/** Whether there is a graphics processor; one that is computed by the processor is slower than the processor. */
async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter;
}

async function open(about, { script, glue }, where, network, binary) {
  const folder = new URL(`${about.runtime.folder}/`, self.location);
  const ort = await import(new URL(script, folder));
  const threads = where === 'threads' ? Math.min(4, navigator.hardwareConcurrency) : 1;
  Object.assign(ort.env.wasm, { wasmBinary: binary, wasmPaths: { mjs: new URL(glue, folder).href }, numThreads: threads });
  const provider = where === 'webgpu' ? 'webgpu' : 'wasm';
  // Warnings tell which operation is computed where, which is no concern of a visitor's.
  const session = await ort.InferenceSession.create(network, { executionProviders: [provider], logSeverityLevel: 3 });
  const [height, width] = about.size;
  compute = async (pixels) => {
    const image = new ort.Tensor('float32', planes(pixels, height * width), [1, 3, height, width]);
    const { labels } = await session.run({ image });
    return Uint16Array.from(labels.data);
  };
  // Only an image tells whether a graphics processor takes the network.
  if (where === 'webgpu') await compute(new Uint8ClampedArray(4 * height * width));
  return { webgpu: 'WebGPU', threads: `WebAssembly, ${threads} threads`, single: 'WebAssembly, 1 thread' }[where];
}

/** From red, green, blue and alpha of each pixel to all reds, all greens, all blues. */
function planes(pixels, size) {
  const values = new Float32Array(3 * size);
  for (let place = 0; place < size; place += 1) {
    values[place] = pixels[4 * place];
    values[size + place] = pixels[4 * place + 1];
    values[2 * size + place] = pixels[4 * place + 2];
  }
  return values;
}

/** The content of files {file, bytes, sha256}, from the browser's cache or from the server. */
async function load(files, cache) {
  const of = files.reduce((sum, { bytes }) => sum + bytes, 0);
  let done = 0;
  const arrived = (bytes) => {
    done += bytes;
    self.postMessage({ done, of });
  };
  const kept = await self.caches?.open(cache).catch(() => null);
  const contents = [];
  for (const { file, bytes, sha256 } of files) {
    const address = new URL(file, self.location).href;
    const known = await kept?.match(address);
    // HTTP's own cache would keep it a second time, or bring one of another version.
    const content = await read(known || await fetch(address, { cache: 'no-store' }), file, bytes, arrived);
    if (self.crypto.subtle && await digest(content) !== sha256) {
      await kept?.delete(address);
      throw new Error(`${file} is not the one that belongs to this page. Load the page anew.`);
    }
    if (!known) await kept?.put(address, new Response(content)).catch(() => {}); // without room it is loaded each time
    contents.push(content);
  }
  return contents;
}

async function read(response, file, bytes, arrived) {
  if (!response.ok) throw new Error(`${file} cannot be loaded: the server answers ${response.status}.`);
  const content = new Uint8Array(bytes);
  let place = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length > bytes) throw new Error(`${file} is larger than expected. Load the page anew.`);
    content.set(value, place);
    place += value.length;
    arrived(value.length);
  }
  if (place !== bytes) throw new Error(`${file} did not arrive whole. Load the page anew.`);
  return content;
}

async function digest(content) {
  const bytes = new Uint8Array(await self.crypto.subtle.digest('SHA-256', content));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

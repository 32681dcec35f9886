// Predicts in the browser: pictures, the camera and videos go to worker.js, and nowhere else.
// ?run=webgpu, ?run=threads and ?run=single choose where it computes.

const LONGEST_SIDE = 1600; // of what is shown; the mask has all pixels
const FRAMES = 10; // over which their rate is measured

const element = document.body;
const find = (selector) => element.querySelector(selector);

main().catch((error) => {
  find('.message').textContent = error.message;
  find('.message').hidden = false;
});

async function main() {
  if (location.protocol === 'file:') {
    throw new Error('A browser runs this page only from a web server, such as: python -m http.server');
  }
  if (await isolate()) return;
  const about = await (await fetch('model.json')).json();
  run(about);
}

/** Start the service worker; true if the page is being loaded anew, with the headers that it adds. */
async function isolate() {
  const container = navigator.serviceWorker;
  const claimed = new Promise((resolve) => container?.addEventListener('controllerchange', () => resolve(true)));
  let registration;
  try {
    registration = await container.register('service_worker.js');
  } catch {
    return false; // not there, or the address is not a secure one
  }
  if (self.crossOriginIsolated || sessionStorage.getItem('isolated')) return false;
  if (!container.controller) {
    const worker = registration.installing;
    if (!worker) return false; // the visitor asked for a page without it
    const failed = new Promise((resolve) => worker.addEventListener('statechange', () => {
      if (worker.state === 'redundant') resolve(false);
    }));
    if (!await Promise.race([claimed, failed])) return false;
  }
  sessionStorage.setItem('isolated', 'tried'); // once: some browsers do not isolate all the same
  location.reload();
  return true;
}

function run(about) {
  const [height, width] = about.size;
  find('.stage').append(find('.sources').content);
  const { complain, show } = createViewer(element, about.opacity);
  const { predict, ready } = startNetwork(about);

  const scaled = document.createElement('canvas');
  Object.assign(scaled, { width, height });
  const pen = scaled.getContext('2d', { willReadFrequently: true });
  Object.assign(pen, { imageSmoothingQuality: 'high', fillStyle: 'white' });

  let turn = 0; // of what was asked for last: what is older ends
  let stop = () => {};

  find('.model').textContent = `${about.origin.config} · ${about.origin.checkpoint} · ${about.precision}`;
  find('.limits').textContent =
    `scaled to ${width} × ${height} pixels for the network, and the labels back; nothing leaves this machine`;
  find('.drop strong').textContent = 'Drop an image or a video here';
  for (const input of element.querySelectorAll('.file')) input.accept = 'image/*,video/*';
  ready.then((where) => {
    find('.made').textContent =
      `${about.runtime.name}, ${where} · model of ${(about.model.bytes / 1e6).toFixed(1)} MB, ${about.precision}`;
  }, (error) => complain(error.message));

  /** Predict an image or a frame, unless something else was asked for meanwhile; whether it was shown. */
  async function process(source, name, size, mine, more = {}) {
    const [fullWidth, fullHeight] = size;
    const began = performance.now();
    pen.fillRect(0, 0, width, height); // what is transparent is white, as for `recnext predict`
    pen.drawImage(source, 0, 0, width, height);
    const { data } = pen.getImageData(0, 0, width, height);
    const picture = draw(source, fullWidth, fullHeight);
    const prepared = performance.now() - began;
    const { labels, milliseconds } = await predict(data);
    if (mine !== turn) return false;
    show({
      name,
      width: fullWidth,
      height: fullHeight,
      picture,
      shown: [width, height],
      labels,
      areas: measure(labels, about),
      timings: [
        ['prepare', formatMilliseconds(prepared)],
        ['network and labels', formatMilliseconds(milliseconds)],
        ['total', formatMilliseconds(prepared + milliseconds)],
        ...(more.rate ? [['frames a second', more.rate()]] : []),
      ],
      next: more.next,
      mask: () => writeLabels(enlarge(labels, about.size, fullWidth, fullHeight), fullWidth, fullHeight, about.palette),
    });
    return true;
  }

  /** A new turn: whatever runs is stopped. */
  function begin() {
    turn += 1;
    stop();
    stop = () => {};
    find('.stop').hidden = true;
    complain('');
    return turn;
  }

  async function take(file) {
    const mine = begin();
    try {
      if (!file.size) throw new Error(`${file.name} is empty: 0 bytes.`);
      if (file.type.startsWith('video/')) await playVideo(file, mine);
      else await takeImage(file, mine);
    } catch (error) {
      if (mine === turn) complain(error.message);
    }
  }

  async function takeImage(file, mine) {
    let image;
    try {
      // Values as they are in the file, upright.
      image = await createImageBitmap(file, { colorSpaceConversion: 'none', imageOrientation: 'from-image' });
    } catch {
      throw new Error(`${file.name} is not an image or a video that this browser can read.`);
    }
    const pixels = image.width * image.height;
    if (pixels > about.most_pixels) {
      throw new Error(
        `${file.name} has ${(pixels / 1e6).toFixed(1)} million pixels; expected at most ${about.most_pixels / 1e6}.`
      );
    }
    await ready;
    await process(image, file.name, [image.width, image.height], mine);
    image.close();
  }

  async function playVideo(file, mine) {
    const video = Object.assign(document.createElement('video'), { muted: true, playsInline: true });
    video.src = URL.createObjectURL(file);
    try {
      await watchVideo(video, file.name, mine, `${file.name} is not a video that this browser can play.`);
    } finally {
      URL.revokeObjectURL(video.src);
    }
  }

  async function useCamera() {
    const mine = begin();
    try {
      if (!navigator.mediaDevices) throw new Error('A browser gives the camera only to pages of https or of this machine.');
      const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } }).catch((error) => {
        throw new Error(error.name === 'NotFoundError' ? 'There is no camera.' : `The camera cannot be used: ${error.message}`);
      });
      const video = Object.assign(document.createElement('video'), { muted: true, playsInline: true, srcObject: stream });
      try {
        if (mine === turn) await watchVideo(video, 'camera', mine, 'The camera gives no pictures.');
      } finally {
        for (const track of stream.getTracks()) track.stop();
      }
    } catch (error) {
      if (mine === turn) complain(error.message);
    }
  }

  /** Predict one frame after the other, the newest that there is, until the end or until it is stopped. */
  async function watchVideo(video, name, mine, refusal) {
    await ready;
    if (mine !== turn) return;
    let over = false;
    const ended = new Promise((resolve) => {
      stop = () => {
        over = true;
        resolve();
      };
      video.addEventListener('ended', stop);
    });
    find('.stop').hidden = false;
    const moments = [];
    const rate = () => {
      moments.push(performance.now());
      if (moments.length > FRAMES + 1) moments.shift();
      const seconds = (moments.at(-1) - moments[0]) / 1000;
      return seconds ? ((moments.length - 1) / seconds).toFixed(1) : '–';
    };
    try {
      await video.play().catch(() => {
        throw new Error(refusal);
      });
      while (!over) {
        const { videoWidth, videoHeight } = video;
        await process(video, name, [videoWidth, videoHeight], mine, { next: moments.length > 0, rate });
        await Promise.race([ended, new Promise((resolve) => video.requestVideoFrameCallback(resolve))]);
      }
    } finally {
      video.pause();
      if (mine === turn) find('.stop').hidden = true;
    }
  }

  takeFiles(element, take);
  find('.camera').addEventListener('click', useCamera);
  find('.stop').addEventListener('click', () => stop());
}

/** The worker: predict(pixels) gives a Promise of {labels, milliseconds}; ready one of where it computes. */
function startNetwork(about) {
  const worker = new Worker('worker.js', { type: 'module' });
  const waiting = new Map(); // by number: who is to get the answer
  let number = 0;
  const ready = new Promise((resolve, reject) => {
    worker.addEventListener('error', (event) => reject(new Error(`The network cannot be started: ${event.message || 'worker.js'}`)));
    worker.addEventListener('message', ({ data }) => {
      if (data.of) return progress(data);
      if (data.number) return settle(waiting, data);
      progress(null);
      return data.ready ? resolve(data.ready) : reject(new Error(`The network cannot be started: ${data.failed}`));
    });
  });
  const run = new URLSearchParams(location.search).get('run') || undefined;
  // The name that service_worker.js knows it by.
  worker.postMessage({ about, run, cache: `recnext ${new URL('./', location)} ${about.version}` });
  const predict = (pixels) => new Promise((resolve, reject) => {
    number += 1;
    waiting.set(number, { resolve, reject });
    worker.postMessage({ number, pixels }, [pixels.buffer]);
  });
  return { predict, ready };
}

function settle(waiting, data) {
  const { resolve, reject } = waiting.get(data.number);
  waiting.delete(data.number);
  if (data.failed) reject(new Error(`The image cannot be segmented: ${data.failed}`));
  else resolve(data);
}

function progress(state) {
  find('.progress').hidden = !state;
  if (!state) return;
  const { done, of } = state;
  find('.progress progress').value = done / of;
  find('.progress span').textContent = done < of
    ? `loading the network: ${(done / 1e6).toFixed(1)} of ${(of / 1e6).toFixed(1)} MB, once`
    : 'starting the network';
}

/** A copy of an image or a frame, as large as is shown. */
function draw(source, width, height) {
  const factor = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(width * factor));
  canvas.height = Math.max(1, Math.round(height * factor));
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', 'The image');
  canvas.getContext('2d').drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** The classes in a label map, the largest first. */
function measure(labels, { classes, palette }) {
  const counts = new Uint32Array(classes.length);
  for (const label of labels) counts[label] += 1;
  const areas = Array.from(counts, (count, label) => {
    const share = count / labels.length;
    const percent = share >= 0.001 ? `${(100 * share).toFixed(1)} %` : '< 0.1 %';
    return { label, name: classes[label], colour: palette[label], share, percent };
  });
  return areas.filter(({ share }) => share).sort((one, other) => other.share - one.share || one.label - other.label);
}

/** A label map at the size of the image: of each pixel the nearest label. */
function enlarge(labels, [height, width], fullWidth, fullHeight) {
  const columns = Uint32Array.from({ length: fullWidth }, (_, x) => Math.floor((x + 0.5) * width / fullWidth));
  const full = new Uint16Array(fullWidth * fullHeight);
  for (let y = 0; y < fullHeight; y += 1) {
    const row = Math.floor((y + 0.5) * height / fullHeight) * width;
    for (let x = 0; x < fullWidth; x += 1) full[y * fullWidth + x] = labels[row + columns[x]];
  }
  return full;
}

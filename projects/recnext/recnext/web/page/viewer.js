// A result and what a visitor does with it: overlay, opacity, legend, highlighted classes, mask. Both pages have it: the
// one whose server predicts (demo.js) and the one that predicts in the browser (site.js).

const REST = 0xff181818; // where another class is highlighted; ABGR

/** The parts of page.html below an element, at work. */
function createViewer(element, opacity) {
  const find = (selector) => element.querySelector(selector);
  const overlay = find('.overlay');
  const entries = new Map(); // of the legend, by label: a frame of a video changes them in place

  let answer = null;
  let highlighted = null;

  function complain(message) {
    find('.message').textContent = message;
    find('.message').hidden = !message;
    if (message) present(false);
  }

  function present(something) {
    for (const part of ['figure', '.facts', '.result']) find(part).hidden = !something;
    find('.drop').hidden = something;
  }

  /**
   * Show a result.
   * - name, width, height: of the image
   * - picture: an element of its proportions, to lie below the overlay
   * - shown: width and height of the labels
   * - labels: a typed array, row by row
   * - areas: {label, name, colour, share, percent} of each class, the largest first
   * - timings: pairs of words
   * - mask: gives a Promise of the PNG
   * - next: whether it follows the one before, as a frame of a video does
   */
  function show(result) {
    const [width, height] = result.shown;
    answer = result;
    if (find('.layers').firstElementChild !== result.picture) {
      if (overlay.previousElementSibling) overlay.previousElementSibling.remove();
      overlay.before(result.picture);
    }
    find('.layers').style.width = `min(100%, ${80 * result.width / result.height}vh)`; // as large as the window allows
    if (overlay.width !== width || overlay.height !== height) Object.assign(overlay, { width, height });
    find('.facts').textContent = `${result.name} · ${result.width} × ${result.height} pixels`;
    find('.timings tbody').replaceChildren(...result.timings.map(timing));
    list(result.areas);
    if (!result.next) highlighted = null;
    paint();
    present(true);
  }

  function timing([stage, words]) {
    const row = document.createElement('tr');
    row.insertCell().textContent = stage;
    row.insertCell().textContent = words;
    return row;
  }

  function list(areas) {
    const legend = find('.legend');
    const seen = new Set(areas.map(({ label }) => label));
    for (const [label, item] of entries) if (!seen.has(label)) item.remove();
    for (const [place, area] of areas.entries()) {
      const item = entry(area);
      // Only what changes its place is touched: a click on the others goes on.
      if (legend.children[place] !== item) legend.insertBefore(item, legend.children[place] || null);
    }
  }

  function entry({ label, name, colour, share, percent }) {
    if (!entries.has(label)) {
      const item = document.createElement('li');
      item.innerHTML = '<button type="button"><i></i><span></span><b></b><em></em></button>';
      item.firstChild.dataset.label = label;
      item.firstChild.addEventListener('click', () => highlight(label));
      entries.set(label, item);
    }
    const item = entries.get(label);
    item.querySelector('i').style.background = `rgb(${colour})`;
    item.querySelector('span').textContent = name;
    item.querySelector('b').textContent = percent;
    item.querySelector('em').style.width = `${100 * share}%`;
    return item;
  }

  function highlight(label) {
    highlighted = label === highlighted ? null : label;
    paint();
  }

  function paint() {
    const only = answer.areas.some(({ label }) => label === highlighted) ? highlighted : null;
    for (const button of element.querySelectorAll('.legend button')) {
      button.setAttribute('aria-pressed', Number(button.dataset.label) === only);
    }
    const colours = new Uint32Array(65536);
    for (const { label, colour: [red, green, blue] } of answer.areas) {
      const visible = only === null || label === only;
      colours[label] = visible ? (0xff000000 | (blue << 16) | (green << 8) | red) : REST;
    }
    const pixels = new Uint32Array(answer.labels.length).map((_, place) => colours[answer.labels[place]]);
    const image = new ImageData(new Uint8ClampedArray(pixels.buffer), ...answer.shown);
    overlay.getContext('2d').putImageData(image, 0, 0);
  }

  function fade() {
    const value = find('.opacity input').value;
    overlay.style.opacity = value / 100;
    find('.opacity output').textContent = `${value} %`;
  }

  /** The class under the pointer. */
  function pointedAt(event) {
    const [width, height] = answer.shown;
    const box = overlay.getBoundingClientRect();
    const column = Math.min(width - 1, Math.floor((event.clientX - box.left) / box.width * width));
    const row = Math.min(height - 1, Math.floor((event.clientY - box.top) / box.height * height));
    return answer.areas.find(({ label }) => label === answer.labels[row * width + column]);
  }

  async function download() {
    const { name, mask } = answer;
    const address = URL.createObjectURL(await mask());
    Object.assign(document.createElement('a'), { href: address, download: name.replace(/\.[^.]*$/, '') + '.png' }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000); // the browser reads it after the click
  }

  find('.opacity input').value = 100 * opacity;
  find('.opacity input').addEventListener('input', fade);
  fade();
  find('.download').addEventListener('click', download);
  overlay.addEventListener('pointermove', (event) => {
    find('.pointed').textContent = pointedAt(event)?.name || '';
  });
  overlay.addEventListener('pointerleave', () => find('.pointed').textContent = '');
  overlay.addEventListener('click', (event) => highlight(pointedAt(event)?.label ?? null));
  return { find, complain, show };
}

/** Hand on each file that is chosen, dropped or pasted. */
function takeFiles(element, take) {
  const given = (file) => file && take(file);
  for (const input of element.querySelectorAll('.file')) {
    input.addEventListener('change', () => {
      given(input.files[0]);
      input.value = ''; // or the same file could not be chosen again
    });
  }
  element.addEventListener('dragover', (event) => {
    event.preventDefault();
    element.classList.add('dragged');
  });
  element.addEventListener('dragleave', () => element.classList.remove('dragged'));
  element.addEventListener('drop', (event) => {
    event.preventDefault();
    element.classList.remove('dragged');
    given(event.dataTransfer.files[0]);
  });
  document.addEventListener('paste', (event) => given(event.clipboardData.files[0]));
}

const formatMilliseconds = (time) => `${time.toFixed(time < 10 ? 1 : 0)} ms`;

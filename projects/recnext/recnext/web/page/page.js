// Runs once, in the component: gradio hands in element, props, trigger and watch. The value is what Demo.answer returns.
const find = (selector) => element.querySelector(selector);
const REST = 0xff181818; // where another class is highlighted; ABGR

let number = 0; // of the last question: an answer to an older one is not shown
let answer = null;
let labels = null;
let highlighted = null;

find('.model').textContent = props.model;
find('.limits').textContent = props.limits;
for (const [choice, { name, image }] of props.choices.entries()) {
  const button = document.createElement('button');
  button.title = name;
  button.append(Object.assign(new Image(), { src: image, alt: name }));
  button.addEventListener('click', () => ask({ choice }));
  find('.choices').append(button);
  find('.choices').hidden = false;
}

// Questions

function ask(question) {
  number += 1;
  complain('');
  trigger('ask', { number, ...question });
}

async function upload(file) {
  if (!file) return;
  complain('');
  if (file.size > props.max_upload) {
    complain(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; expected at most ${props.max_upload / 1e6}.`);
    return;
  }
  const reader = new FileReader();
  reader.addEventListener('load', () => ask({ name: file.name, content: reader.result.split(',')[1] || '' }));
  reader.addEventListener('error', () => complain(`${file.name} cannot be read by the browser.`));
  reader.readAsDataURL(file);
}

for (const input of element.querySelectorAll('.file')) {
  input.addEventListener('change', () => {
    upload(input.files[0]);
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
  upload(event.dataTransfer.files[0]);
});
document.addEventListener('paste', (event) => upload(event.clipboardData.files[0]));

// Answers

watch('value', async () => {
  if (!props.value || props.value.number !== number) return;
  if (props.value.error) complain(props.value.error);
  else await show(props.value);
});

function complain(message) {
  find('.message').textContent = message;
  find('.message').hidden = !message;
  if (message) present(false);
}

function present(something) {
  for (const part of ['figure', '.facts', '.result']) find(part).hidden = !something;
  find('.drop').hidden = something;
}

const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

async function show(value) {
  const stream = new Blob([bytes(value.labels)]).stream().pipeThrough(new DecompressionStream('deflate'));
  const unpacked = new Uint16Array(await new Response(stream).arrayBuffer());
  if (value.number !== number) return;
  answer = value;
  labels = unpacked;
  find('figure img').src = value.image;
  find('.layers').style.width = `min(100%, ${80 * value.width / value.height}vh)`; // as large as the window allows
  [find('canvas').width, find('canvas').height] = value.shown;
  URL.revokeObjectURL(find('.download').href);
  find('.download').href = URL.createObjectURL(new Blob([bytes(value.mask)], { type: 'image/png' }));
  find('.download').download = value.name.replace(/\.[^.]*$/, '') + '.png';
  find('.facts').textContent = `${value.name} · ${value.width} × ${value.height} pixels`;
  const stages = Object.entries(value.milliseconds);
  stages.push(['total', stages.reduce((sum, [, time]) => sum + time, 0)]);
  find('.timings tbody').replaceChildren(...stages.map(timing));
  find('.legend').replaceChildren(...value.areas.map(entry));
  highlight(null);
  present(true);
}

function timing([stage, milliseconds]) {
  const row = document.createElement('tr');
  row.insertCell().textContent = stage;
  row.insertCell().textContent = `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;
  return row;
}

function entry({ label, name, colour, share, percent }) {
  const item = document.createElement('li');
  item.innerHTML = '<button><i></i><span></span><b></b><em></em></button>';
  item.querySelector('i').style.background = `rgb(${colour})`;
  item.querySelector('span').textContent = name;
  item.querySelector('b').textContent = percent;
  item.querySelector('em').style.width = `${100 * share}%`;
  item.firstChild.dataset.label = label;
  item.firstChild.addEventListener('click', () => highlight(label));
  return item;
}

// The picture: the browser alone, without asking the server

function highlight(label) {
  highlighted = label === highlighted ? null : label;
  for (const button of element.querySelectorAll('.legend button')) {
    button.setAttribute('aria-pressed', Number(button.dataset.label) === highlighted);
  }
  const colours = new Uint32Array(65536);
  for (const { label, colour: [red, green, blue] } of answer.areas) {
    const visible = highlighted === null || label === highlighted;
    colours[label] = visible ? (0xff000000 | (blue << 16) | (green << 8) | red) : REST;
  }
  const pixels = new Uint32Array(labels.length).map((_, place) => colours[labels[place]]);
  const image = new ImageData(new Uint8ClampedArray(pixels.buffer), ...answer.shown);
  find('canvas').getContext('2d').putImageData(image, 0, 0);
}

function fade() {
  const opacity = find('.opacity input').value;
  find('canvas').style.opacity = opacity / 100;
  find('.opacity output').textContent = `${opacity} %`;
}

find('.opacity input').value = 100 * props.opacity;
find('.opacity input').addEventListener('input', fade);
fade();

/** The class under the pointer. */
function pointedAt(event) {
  const [width, height] = answer.shown;
  const box = find('canvas').getBoundingClientRect();
  const column = Math.min(width - 1, Math.floor((event.clientX - box.left) / box.width * width));
  const row = Math.min(height - 1, Math.floor((event.clientY - box.top) / box.height * height));
  return answer.areas.find(({ label }) => label === labels[row * width + column]);
}

find('canvas').addEventListener('pointermove', (event) => {
  find('.pointed').textContent = pointedAt(event)?.name || '';
});
find('canvas').addEventListener('pointerleave', () => find('.pointed').textContent = '');
find('canvas').addEventListener('click', (event) => highlight(pointedAt(event)?.label ?? null));

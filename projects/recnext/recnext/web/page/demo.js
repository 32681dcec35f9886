// Asks the server. Runs once, in the component, after viewer.js: gradio hands in element, props, trigger and watch. The
// value is what Demo.answer returns.
const { find, complain, show } = createViewer(element, props.opacity);

let number = 0; // of the last question: an answer to an older one is not shown

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

function ask(question) {
  number += 1;
  complain('');
  trigger('ask', { number, ...question });
}

takeFiles(element, (file) => {
  complain('');
  if (file.size > props.max_upload) {
    complain(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; expected at most ${props.max_upload / 1e6}.`);
    return;
  }
  const reader = new FileReader();
  reader.addEventListener('load', () => ask({ name: file.name, content: reader.result.split(',')[1] || '' }));
  reader.addEventListener('error', () => complain(`${file.name} cannot be read by the browser.`));
  reader.readAsDataURL(file);
});

watch('value', async () => {
  const value = props.value;
  if (!value || value.number !== number) return;
  if (value.error) {
    complain(value.error);
    return;
  }
  const stream = new Blob([bytes(value.labels)]).stream().pipeThrough(new DecompressionStream('deflate'));
  const labels = new Uint16Array(await new Response(stream).arrayBuffer());
  if (value.number !== number) return;
  const stages = Object.entries(value.milliseconds);
  stages.push(['total', stages.reduce((sum, [, time]) => sum + time, 0)]);
  show({
    ...value,
    labels,
    picture: Object.assign(new Image(), { src: value.image, alt: 'The image' }),
    timings: stages.map(([stage, time]) => [stage, formatMilliseconds(time)]),
    mask: async () => new Blob([bytes(value.mask)], { type: 'image/png' }),
  });
});

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

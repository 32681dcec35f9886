// A label map as `recnext predict` writes it: a PNG whose stored values are the labels, with the colours of the classes;
// 16-bit grey if there are more than 256 classes.

/** From a typed array of labels, row by row, to a Promise of a Blob. */
async function writeLabels(labels, width, height, palette) {
  const wide = palette.length > 256;
  const row = 1 + width * (wide ? 2 : 1); // a row begins with its filter: none
  const rows = new Uint8Array(row * height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const label = labels[y * width + x];
      if (wide) rows.set([label >> 8, label & 255], y * row + 1 + 2 * x);
      else rows[y * row + 1 + x] = label;
    }
  }
  const header = new Uint8Array(13);
  new DataView(header.buffer).setUint32(0, width);
  new DataView(header.buffer).setUint32(4, height);
  header.set(wide ? [16, 0] : [8, 3], 8); // bits, kind
  const stream = new Blob([rows]).stream().pipeThrough(new CompressionStream('deflate'));
  const content = new Uint8Array(await new Response(stream).arrayBuffer());
  const chunks = [chunk('IHDR', header), chunk('IDAT', content), chunk('IEND', new Uint8Array())];
  if (!wide) chunks.splice(1, 0, chunk('PLTE', Uint8Array.from(palette.flat())));
  return new Blob([Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a), ...chunks], { type: 'image/png' });
}

function chunk(kind, content) {
  const bytes = new Uint8Array(12 + content.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set([...kind].map((letter) => letter.charCodeAt(0)), 4);
  bytes.set(content, 8);
  view.setUint32(8 + content.length, crc32(bytes.subarray(4, 8 + content.length)));
  return bytes;
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) crc = (crc >>> 8) ^ REMAINDERS[(crc ^ byte) & 255];
  return ~crc >>> 0;
}

const REMAINDERS = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit += 1) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  return value;
});

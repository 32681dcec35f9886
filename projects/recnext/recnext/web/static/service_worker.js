// Two things that a plain file server does not do. Without this file the page works all the same, on one thread and online.
// 1. Offline: the page and its small files are kept by the browser; worker.js keeps the large ones.
// 2. Threads: a page gets them only if its server isolates it from other sites by two headers, which this adds.

const VERSION = '{{version}}'; // of all files: a new export is a new worker
const SHELL = {{shell}};
const HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Content-Security-Policy': {{policy}},
};

// Other folders of this server may hold other pages.
const PREFIX = `recnext ${self.registration.scope} `;
const CACHE = PREFIX + VERSION;

self.addEventListener('install', (event) => {
  self.skipWaiting();
  const requests = SHELL.map((file) => new Request(file, { cache: 'reload' }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(requests)));
});

self.addEventListener('activate', (event) => {
  event.waitUntil((async () => {
    const names = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== CACHE);
    await Promise.all(names.map((name) => caches.delete(name)));
    await self.clients.claim();
  })());
});

self.addEventListener('fetch', (event) => {
  const { method, url } = event.request;
  if (method === 'GET' && url.startsWith(self.registration.scope)) event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  const response = await cache.match(request, { ignoreSearch: true, ignoreVary: true }) || await fetch(request);
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

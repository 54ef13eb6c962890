// Search runs in a worker, which browsers refuse to a page opened from a folder: there, a hidden frame takes its place.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    this.worker = frame.contentWindow;
    addEventListener("message", ({ source, data }) => {
      if (source === this.worker) this.dispatchEvent(new MessageEvent("message", { data }));
    });
    this.worker.document.write(
      `<script>postMessage = (data) => parent.postMessage(data, "*")</script><script src="${url}"></script>`
    );
    this.loaded = new Promise((resolve) => this.worker.addEventListener("load", resolve));
    this.worker.document.close();
  }

  postMessage(data) {
    this.loaded.then(() => this.worker.dispatchEvent(new MessageEvent("message", { data })));
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;

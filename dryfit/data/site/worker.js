// Python in a thread of its own: a question as JSON comes in, an answer as JSON goes out.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const ready = (async () => {
  const files = fetch("project.zip").then(async (answer) => {
    if (!answer.ok) throw new Error(`project.zip: ${answer.status}`);
    return answer.arrayBuffer();
  });
  files.catch(() => {}); // looked at below
  const python = await loadPyodide();
  python.unpackArchive(await files, "zip", { extractDir: "/project" });
  return python.runPython(`
import sys
sys.path.insert(0, "/project")
sys.dont_write_bytecode = True
from dryfit.site.answer import reply
reply`);
})();
ready.then(() => postMessage({ ready: true }), (error) => postMessage({ broken: String(error.message ?? error) }));

onmessage = async ({ data: { id, request } }) => {
  const reply = await ready.catch(() => null);
  if (!reply) return;
  try {
    postMessage({ id, answer: reply(request) });
  } catch (error) {
    const line = String(error.message ?? error).trim().split("\n").pop();
    const found = [{ problem: `The calculator failed: ${line}`, allowed: "the command line, which says more" }];
    postMessage({ id, answer: JSON.stringify({ error: found }) });
  }
};

// A classifier in the browser: onnxruntime-web's WebAssembly kernels, one thread.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1;

export const version = ort.env.versions.web;

export async function open(url) {
  const session = await ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
  const [input] = session.inputNames;
  const [output] = session.outputNames;
  return async (rows, shape) => (await session.run({ [input]: new ort.Tensor("float32", rows, shape) }))[output];
}

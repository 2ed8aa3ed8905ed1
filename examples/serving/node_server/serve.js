// A classifier behind HTTP in Node.js: POST rows of float32 as bytes, get the scores as JSON.
//
//     node serve.js model.onnx 8000
import { createServer } from "node:http";
import ort from "onnxruntime-node";

const options = { executionProviders: ["cpu"], intraOpNumThreads: 1 };

export async function open(model) {
  const session = await ort.InferenceSession.create(model, options);
  const [input] = session.inputNames;
  const [output] = session.outputNames;
  const [, ...rowShape] = session.inputMetadata[0].shape;
  const rowSize = rowShape.reduce((a, b) => a * b, 1);
  return async (rows) => {
    const tensor = new ort.Tensor("float32", rows, [rows.length / rowSize, ...rowShape]);
    return (await session.run({ [input]: tensor }))[output];
  };
}

export async function serve(model, port) {
  const predict = await open(model);
  const server = createServer(async (request, response) => {
    const parts = [];
    for await (const part of request) parts.push(part);
    const body = Buffer.concat(parts);
    const rows = new Float32Array(body.buffer.slice(body.byteOffset, body.byteOffset + body.length));
    const scores = await predict(rows);
    response.setHeader("Content-Type", "application/json");
    response.end(JSON.stringify({ scores: Array.from(scores.data), dims: scores.dims }));
  });
  await new Promise((listening) => server.listen(port, "127.0.0.1", listening));
  return server;
}

if (process.argv[1] === import.meta.filename) {
  await serve(process.argv[2], Number(process.argv[3] ?? 8000));
}

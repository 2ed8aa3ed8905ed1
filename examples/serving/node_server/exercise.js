// Call the classifier on the float and on the quantized file in turns, and once over HTTP.
//
//     node exercise.js JOB OUT
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { open, serve } from "./serve.js";

const [folder, out] = process.argv.slice(2);
const job = JSON.parse(readFileSync(join(folder, "job.json"), "utf8"));
const bytes = readFileSync(join(folder, "rows.f32"));
const all = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
const [count, ...rowShape] = job.shape;
const size = rowShape.reduce((a, b) => a * b, 1);
const row = (index) => all.subarray((index % count) * size, ((index % count) + 1) * size);
const sides = ["float", "int8"];

const predict = {};
for (const side of sides) {
  predict[side] = await open(job[side]);
  const outputs = [];
  for (let index = 0; index < count; index++) outputs.push(...(await predict[side](row(index))).data);
  writeFileSync(join(out, `${side}.f32`), new Float32Array(outputs));

  const server = await serve(job[side], 0);
  const url = `http://127.0.0.1:${server.address().port}/`;
  const answer = await (await fetch(url, { method: "POST", body: row(0).slice() })).json();
  if (answer.scores.some((value, index) => value !== outputs[index])) throw new Error("HTTP changed the scores");
  server.close();
  server.closeAllConnections();
}

const times = { float: [], int8: [] };
for (let turn = 0; turn < job.slices; turn++) {
  for (const side of turn % 2 ? sides : [...sides].reverse()) {
    await predict[side](row(0)); // brings its weights back into the caches
    const calls = [];
    for (let call = 0; call < job.calls; call++) {
      const began = performance.now();
      await predict[side](row(call));
      calls.push(performance.now() - began);
    }
    times[side].push(calls.sort((a, b) => a - b)[calls.length >> 1]);
  }
}
const { version } = createRequire(import.meta.url)("onnxruntime-node/package.json");
const runtime = `onnxruntime-node ${version}, Node.js ${process.versions.node}`;
writeFileSync(join(out, "times.json"), JSON.stringify({ runtime, float_ms: times.float, int8_ms: times.int8 }));
process.exit(0);

// Stream a completion over gRPC from Node, with or without Star Attention. Stubs are made of the .proto file at load.
//
//   cd examples/node && npm install
//   node grpc_stream.mjs 'The capital of France is' --address 127.0.0.1:50051 --star-block-size 128

import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    address: { type: "string", default: "127.0.0.1:50051" },
    "max-tokens": { type: "string", default: "64" },
    "star-block-size": { type: "string" },
  },
});
if (positionals.length !== 1) {
  console.error("usage: node grpc_stream.mjs PROMPT [--address HOST:PORT] [--max-tokens N] [--star-block-size B]");
  process.exit(2);
}

const protos = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "proto");
const options = { keepCase: true, longs: String, enums: String, oneofs: true, includeDirs: [protos] };
const { starling } = grpc.loadPackageDefinition(loadSync("starling/v1/inference.proto", options));
const client = new starling.v1.InferenceService(values.address, grpc.credentials.createInsecure());

const request = { text: positionals[0], sampling: { temperature: 0, max_tokens: Number(values["max-tokens"]) } };
if (values["star-block-size"]) {
  request.star = { mode: "MODE_ON", block_size: values["star-block-size"] };
}

const call = client.GenerateStream(request);
call.on("data", (event) => {
  if (event.delta) process.stdout.write(event.delta.text);
  if (event.final) console.log(`\n\n${JSON.stringify(event.final, null, 2)}`);
});
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
process.on("SIGINT", () => call.cancel());

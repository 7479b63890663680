// foretell from Node: the contracts of protos/, read at run time; TLS, a token, deadlines, errors.
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const MESSAGE_BYTES = 64 * 1024 * 1024;
const root = (folder) => fileURLToPath(new URL(`../../${folder}`, import.meta.url));

const definition = loader.loadSync(
  [
    "foretell/embedder/v1/embedder_service.proto",
    "foretell/predictor/v1/event_service.proto",
    "foretell/predictor/v1/model_service.proto",
    "foretell/predictor/v1/prediction_service.proto",
    "google/rpc/error_details.proto",
    "google/rpc/status.proto",
  ],
  {
    includeDirs: [root("protos"), root("third_party/googleapis")],
    enums: String,
    longs: Number,
    defaults: true,
  },
);
const { embedder, predictor } = grpc.loadPackageDefinition(definition).foretell;

// As the Python client repeats calls: writes too, by whose requestId the service knows them again.
const retryPolicy = {
  maxAttempts: 5,
  initialBackoff: "0.1s",
  maxBackoff: "2s",
  backoffMultiplier: 2,
  retryableStatusCodes: ["UNAVAILABLE", "CANCELLED"],
};

/** An error that a service answered with. */
export class ForetellError extends Error {
  constructor(error) {
    super(error.details);
    this.code = grpc.status[error.code];
    const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
    const details = bytes ? definition["google.rpc.Status"].deserialize(bytes).details : [];
    const read = (type) => {
      const found = details.find((one) => one.type_url.endsWith(`/${type}`));
      return found && definition[type].deserialize(found.value);
    };
    this.reason = read("google.rpc.ErrorInfo")?.reason ?? "";
    this.field = read("google.rpc.BadRequest")?.fieldViolations[0]?.field ?? "";
    const delay = read("google.rpc.RetryInfo")?.retryDelay;
    this.retryAfterS = delay ? delay.seconds + delay.nanos / 1e9 : undefined;
  }
}

/**
 * Clients of the four services; each method takes a request and gives a promise of the answer.
 *
 * @param {{embedder: string, predictor: string}} addresses host:port of each.
 * @param {{caFile?: string, tokenFile?: string, timeoutS?: number}} settings TLS where there is a
 *   caFile; timeoutS is every call's deadline.
 */
export function connect(addresses, { caFile, tokenFile, timeoutS = 30 } = {}) {
  const credentials = caFile
    ? grpc.credentials.createSsl(readFileSync(caFile))
    : grpc.credentials.createInsecure();
  const options = {
    "grpc.max_receive_message_length": MESSAGE_BYTES,
    "grpc.max_send_message_length": MESSAGE_BYTES,
    "grpc.service_config": JSON.stringify({ methodConfig: [{ name: [{}], retryPolicy }] }),
  };
  const opened = [];
  const open = (Service, address) => {
    const stub = new Service(address, credentials, options);
    opened.push(stub);
    const client = {};
    for (const [name, method] of Object.entries(Service.service)) {
      if (method.responseStream) continue; // WatchItems
      const call = promisify(stub[name].bind(stub));
      const writes = method.requestType.type.field.some((field) => field.name === "requestId");
      client[method.originalName] = async (request) => {
        const metadata = new grpc.Metadata();
        if (tokenFile) {
          metadata.set("authorization", `Bearer ${readFileSync(tokenFile, "utf8").trim()}`);
        }
        const sent = writes ? { requestId: randomUUID(), ...request } : request;
        try {
          return await call(sent, metadata, { deadline: Date.now() + timeoutS * 1000 });
        } catch (error) {
          throw new ForetellError(error);
        }
      };
    }
    return client;
  };
  return {
    embedder: open(embedder.v1.EmbedderService, addresses.embedder),
    events: open(predictor.v1.EventService, addresses.predictor),
    models: open(predictor.v1.ModelService, addresses.predictor),
    predictions: open(predictor.v1.PredictionService, addresses.predictor),
    close: () => opened.forEach((stub) => stub.close()),
  };
}

/** The numbers of little-endian float32 bytes, such as a SearchResult's scores. */
export function floats(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Float32Array.from({ length: bytes.length / 4 }, (_, at) => view.getFloat32(4 * at, true));
}

/** The rows of a VectorBlock of float32, which is what one asks for by default. */
export function vectors(block) {
  const all = floats(block.data);
  return Array.from({ length: block.rows }, (_, row) =>
    all.subarray(row * block.cols, (row + 1) * block.cols),
  );
}

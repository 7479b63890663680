// Items, events, a search, a prediction, an error:
//
//   npm install
//   node example.mjs [--embedder HOST:PORT] [--predictor HOST:PORT] [--ca-file F] [--token-file F]
import { parseArgs } from "node:util";

import { connect, floats, ForetellError, vectors } from "./foretell.mjs";

const { values } = parseArgs({
  options: {
    embedder: { type: "string", default: "127.0.0.1:50051" },
    predictor: { type: "string", default: "127.0.0.1:50052" },
    "ca-file": { type: "string" },
    "token-file": { type: "string" },
  },
});

const foretell = connect(values, { caFile: values["ca-file"], tokenFile: values["token-file"] });
try {
  const { upserted } = await foretell.embedder.upsertItems({
    items: [
      { id: "tea-1", text: "green tea, 20 bags", attributes: { price: "3.49" } },
      { id: "mug-1", text: "large mug" },
    ],
  });
  const { accepted } = await foretell.events.ingestEvents({
    events: [{ userId: "anna", behaviorType: "buy", itemId: "tea-1" }],
  });
  console.log(`${upserted} items and ${accepted} event taken`);

  const { results } = await foretell.embedder.search({ texts: { texts: ["mint tea"] }, k: 2 });
  const scores = floats(results[0].scores);
  results[0].ids.forEach((id, at) => console.log(`found ${id} ${scores[at].toFixed(3)}`));

  const embedded = await foretell.embedder.embed({ texts: ["green tea, 20 bags"] });
  const [vector] = vectors(embedded.vectors);
  console.log(`a vector of ${vector.length}, length ${Math.hypot(...vector).toFixed(3)}`);

  const { prediction } = await foretell.predictions.predict({ query: { userId: "anna", k: 2 } });
  for (const one of prediction.behaviorTypes) {
    console.log(`next: ${one.behaviorType} ${(100 * one.probability).toFixed(1)}%`);
  }
  for (const item of prediction.items) {
    console.log(`item: ${item.itemId} ${item.interestScore.toFixed(2)} ${item.method}`);
  }
  await foretell.predictions.predict({ query: { userId: "anna", k: 100_000 } });
} catch (error) {
  if (!(error instanceof ForetellError)) throw error;
  console.log(`error: ${error.code} ${error.reason} ${error.field}`);
} finally {
  foretell.close();
}

// k6 calls Predict at a constant rate: the peer of bench.load_agreement. Prints one JSON object.
import grpc from 'k6/net/grpc';
import { check } from 'k6';

const { ADDRESS, PROTOS, GOOGLEAPIS, RATE, SECONDS, WARM_UP, USERS } = __ENV;
const VUS = 100;
const MEASURED = '{scenario:measured}';

const client = new grpc.Client();
client.load([PROTOS, GOOGLEAPIS], 'foretell/predictor/v1/prediction_service.proto');

function scenario(start, seconds) {
  return {
    executor: 'constant-arrival-rate',
    rate: Number(RATE),
    timeUnit: '1s',
    startTime: `${start}s`,
    duration: `${seconds}s`,
    gracefulStop: '10s',
    preAllocatedVUs: VUS,
    maxVUs: VUS,
  };
}

export const options = {
  scenarios: { warm_up: scenario(0, WARM_UP), measured: scenario(WARM_UP, SECONDS) },
  summaryTrendStats: ['med', 'p(99)', 'count'],
  // A threshold is what makes k6 sum up a scenario by itself.
  thresholds: {
    [`grpc_req_duration${MEASURED}`]: ['max>=0'],
    [`dropped_iterations${MEASURED}`]: ['count>=0'],
    [`checks${MEASURED}`]: ['rate>=0'],
  },
};

let connected = false;

export default function () {
  if (!connected) {
    client.connect(ADDRESS, { plaintext: true });
    connected = true;
  }
  const user = Math.floor(Math.random() * Number(USERS));
  const answer = client.invoke('foretell.predictor.v1.PredictionService/Predict', {
    query: { user_id: `load-test-${user}` },
  });
  check(answer, { answered: (one) => one && one.status === grpc.StatusOK });
}

export function handleSummary(data) {
  const values = (name) => (data.metrics[`${name}${MEASURED}`] || { values: {} }).values;
  const times = values('grpc_req_duration');
  return {
    stdout: JSON.stringify({
      p50_ms: times.med,
      p99_ms: times['p(99)'],
      answered_s: times.count / Number(SECONDS),
      skipped: values('dropped_iterations').count || 0,
      failed: values('checks').fails,
    }),
  };
}

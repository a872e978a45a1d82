// Streams a month of events in and its usage out. A broken connection costs a resend, never a number.
//
//   metering serve                            # in another terminal
//   cd examples/node && npm ci
//   node main.js                              # as often as you like: nothing counts twice
//
// It calls METERING_ADDRESS (localhost:50051) with METERING_API_KEY, if there is one.

import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import grpc from '@grpc/grpc-js'
import protoLoader from '@grpc/proto-loader'

const ADDRESS = process.env.METERING_ADDRESS || 'localhost:50051'
const KEY = process.env.METERING_API_KEY
// Ids of our own make creations safe to retry. Yours come from where you keep your customers.
const METRIC_ID = '6f1c2a52-5d0e-4f7b-9c57-0a1b8a3d9e10'
const CUSTOMERS = {
  globex: '0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c101',
  initech: '0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c102',
  umbrella: '0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c103',
}
const START = Date.UTC(2026, 0, 1) / 1000
const HOURS = 31 * 24
const BATCH = 200
// Some of these were never begun, of others the outcome is unknown, and proxies turn broken connections into INTERNAL
// and UNKNOWN: do the same again. Anything else, such as a bad field or key, would only fail again.
// FAILED_PRECONDITION: a metric just created may still be counting the events of the past.
const RETRYABLE = ['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'CANCELLED', 'ABORTED', 'RESOURCE_EXHAUSTED', 'INTERNAL',
  'UNKNOWN', 'FAILED_PRECONDITION']

const files = ['billable_metric', 'customer', 'event', 'usage'].map((name) => `metering/v1/${name}.proto`)
const protos = fileURLToPath(new URL('../../protos', import.meta.url))
// Integers of 64 bits as strings: a JavaScript number would round them.
const definitions = protoLoader.loadSync(files, { includeDirs: [protos], longs: String, enums: String })
const api = grpc.loadPackageDefinition(definitions).metering.v1
const connect = (service) => new service(ADDRESS, grpc.credentials.createInsecure())
const services = {
  metrics: connect(api.BillableMetricService),
  customers: connect(api.CustomerService),
  events: connect(api.EventService),
  usage: connect(api.UsageService),
}
const metadata = new grpc.Metadata()
if (KEY) metadata.set('authorization', `Bearer ${KEY}`)
// It also ends a call whose connection went silent; a stream that it cuts is resumed like any other.
const options = () => ({ deadline: Date.now() + 60_000 })
const seconds = (time) => ({ seconds: time })

/** Tries until it succeeds, later after each failure in a row, and gives up at the seventh. */
async function retry(what, attempt) {
  for (let failures = 0; ;) {
    try {
      return await attempt(() => { failures = 0 }) // what a stream calls when it got on
    } catch (error) {
      failures += 1
      if (failures > 6 || !RETRYABLE.includes(grpc.status[error.code])) throw error
      // With jitter: clients that failed together must not come back together.
      const wait = (0.5 + Math.random() / 2) * Math.min(5000, 100 * 2 ** failures)
      console.error(`${what}: again in ${wait.toFixed()} ms after ${error.message}`)
      await sleep(wait)
    }
  }
}

/** A unary call as a promise. */
const call = (client, method, request) => new Promise((resolve, reject) =>
  client[method](request, metadata, options(), (error, answer) => error ? reject(error) : resolve(answer)))

/** Creates the metric, which says what counts, and the customers for whom it counts. Again changes nothing. */
async function createCatalog() {
  const billableMetric = {
    id: METRIC_ID,
    name: 'Example downloads',
    aggregationType: 'AGGREGATION_TYPE_SUM',
    aggregationKey: 'bytes',
    eventTypeFilter: { inValues: ['download'] },
  }
  await retry('creating', () => call(services.metrics, 'CreateBillableMetric', { billableMetric }))
  for (const [name, id] of Object.entries(CUSTOMERS)) {
    const customer = { id, name, ingestAliases: [name] } // events name it by the alias
    await retry('creating', () => call(services.customers, 'CreateCustomer', { customer }))
  }
}

/** A download per customer and hour, in place of what your service has seen. */
function makeEvents() {
  const names = Object.keys(CUSTOMERS)
  return Array.from({ length: HOURS }, (_, hour) => names.map((name, i) => ({
    // Made of what identifies the fact, so the same after a crash. A random id must be kept with its event.
    transactionId: `download-${name}-${hour}`,
    customerId: name,
    eventType: 'download',
    timestamp: seconds(START + 3600 * hour),
    // A string is exact at any length; a JSON number only as far as a double is.
    properties: { fields: { bytes: { stringValue: `${1000 * (Math.floor(hour / 24) + 1) + 10 * (hour % 24) + i + 1}` } } },
  }))).flat()
}

/** Writes numbered batches, as fast as they are taken. Ends quietly with the stream, whose reader knows why. */
async function write(stream, batches) {
  try {
    for (const [i, events] of batches.entries()) {
      if (!stream.write({ sequence: i + 1, events })) await once(stream, 'drain')
    }
    stream.end()
  } catch {}
}

/** Streams events in batches, sends again what was not answered when a stream broke, and counts what is stored. */
async function send(events) {
  const batches = []
  for (let i = 0; i < events.length; i += BATCH) batches.push(events.slice(i, i + BATCH))
  let answered = 0
  let stored = 0
  await retry('sending', async (progress) => {
    const stream = services.events.StreamEvents(metadata, options())
    write(stream, batches.slice(answered)) // every stream counts from 1
    for await (const { verdicts, issues } of stream) {
      for (const { index, field, message } of issues ?? []) { // the fault of one event; the others are stored
        console.error(`not stored: ${batches[answered][index ?? 0].transactionId}: ${field}: ${message}`)
      }
      stored += verdicts.filter((verdict) => ['VERDICT_ACCEPTED', 'VERDICT_DUPLICATE'].includes(verdict)).length
      answered += 1 // answers come in the order of the batches
      progress()
    }
    if (answered < batches.length) throw CUT
  })
  return stored
}

/** Streams the usage of every hour, and resumes after the last message received until one is complete. */
async function totalPerDay() {
  const request = {
    customerIds: Object.values(CUSTOMERS),
    billableMetrics: [{ id: METRIC_ID }],
    windowSize: 'WINDOW_SIZE_HOUR',
    startingOn: seconds(START),
    endingBefore: seconds(START + 3600 * HOURS),
  }
  const totals = {}
  let windows = 0
  await retry('reading', async (progress) => {
    if (request.resumeToken) console.error(`resuming after ${windows} windows`)
    let complete = false
    for await (const message of services.usage.StreamUsage(request, metadata, options())) {
      for (const { startingOn, value } of message.windows ?? []) {
        const day = new Date(1000 * startingOn.seconds).toISOString().slice(0, 10)
        // No value is no usage. A BigInt is exact and refuses fractions: fine for bytes, else take a decimal library.
        totals[day] = (totals[day] ?? 0n) + BigInt(value ?? 0)
      }
      windows += message.windows?.length ?? 0
      // A program that keeps its totals in a database writes the token there in the same transaction.
      request.resumeToken = message.resumeToken
      complete = message.complete
      progress()
    }
    if (!complete) throw CUT
  })
  return totals
}

const CUT = Object.assign(new Error('the stream ended before its end'), { code: grpc.status.UNAVAILABLE })

try {
  await createCatalog()
  const events = makeEvents()
  const stored = await send(events)
  console.log(`stored ${stored} of ${events.length} events`)
  const totals = await totalPerDay()
  for (const day of Object.keys(totals).sort()) console.log(day, `${totals[day]}`)
  console.log(`total ${Object.values(totals).reduce((sum, total) => sum + total, 0n)}`)
  if (stored < events.length) throw new Error('some events were not stored, see above')
} catch (error) {
  console.error(`failed at ${ADDRESS}: ${error.message}`)
  process.exitCode = 1
} finally {
  Object.values(services).forEach((service) => service.close())
}

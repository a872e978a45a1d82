// Sends three days of transfers with Metronome's SDK, to metering, and prints their usage: by day, by region, and what
// an error looks like.
//
//   metering serve --gateway 127.0.0.1:8080   # in another terminal
//   cd examples/clients/metronome_node && npm ci
//   node main.js                              # as often as you like: nothing counts twice
//
// It calls METRONOME_BASE_URL (http://localhost:8080) with METRONOME_BEARER_TOKEN, an API key; a server without keys
// takes any.

import { setTimeout as sleep } from 'node:timers/promises'
import Metronome from '@metronome/sdk'

const client = new Metronome({
  baseURL: process.env.METRONOME_BASE_URL || 'http://localhost:8080',
  bearerToken: process.env.METRONOME_BEARER_TOKEN || 'any',
})
const ALIAS = 'transfers@example-metronome-node'
const DAYS = ['2026-01-01', '2026-01-02', '2026-01-03']
const REGIONS = ['EU-Central', 'US-East', 'US-West']
// The fourth day has no usage: not 0, but null.
const BOUNDS = { starting_on: '2026-01-01T00:00:00Z', ending_before: '2026-01-05T00:00:00Z' }

// The same key and content answer with what the first call created, so that a retry, or another run, makes no second.
const once = (key) => ({ headers: { 'Idempotency-Key': key } })

async function createCatalog() {
  const metric = await client.v1.billableMetrics.create(
    {
      name: 'Transfers of example-metronome-node',
      aggregation_type: 'SUM',
      aggregation_key: 'megabytes',
      event_type_filter: { in_values: ['example-metronome-node'] },
      group_keys: [['region']],
    },
    once('example-metronome-node-metric'),
  )
  const customer = await client.v1.customers.create(
    { name: 'Customer of example-metronome-node', ingest_aliases: [ALIAS] },
    once('example-metronome-node-customer'),
  )
  return { metric: metric.data.id, customer: customer.data.id }
}

async function send() {
  const events = []
  for (const [i, day] of DAYS.entries()) {
    for (const [j, region] of REGIONS.entries()) {
      for (let hour = 0; hour < 24; hour++) {
        const at = `${day}T${String(hour).padStart(2, '0')}:30:00Z`
        events.push({
          // Says what it is of, not when it was sent: sent again it is the same event.
          transaction_id: `example-metronome-node-${region}-${at}`,
          customer_id: ALIAS,
          event_type: 'example-metronome-node',
          timestamp: at,
          // As text it is an exact decimal at any length.
          properties: { region, megabytes: `${100 * (i + 1) + 10 * j}.${hour}` },
        })
      }
    }
  }
  for (let i = 0; i < events.length; i += 100) await client.v1.usage.ingest({ usage: events.slice(i, i + 100) })
  return events.length
}

const day = (time) => time.slice(0, 10)
const shown = (value) => (value === null ? 'no usage' : value)

async function printUsage({ metric, customer }) {
  const query = { ...BOUNDS, window_size: 'DAY', customer_ids: [customer], billable_metrics: [{ id: metric }] }
  // Iterating asks for the next page when one is at its end. Tries again longer than the SDK does by itself: a metric
  // that was created a moment ago may still be counting events from before it, and says when to ask again.
  for await (const row of client.v1.usage.list(query, { maxRetries: 10 })) {
    console.log(day(row.start_timestamp), shown(row.value))
  }

  const groups = { ...BOUNDS, window_size: 'NONE', customer_id: customer, billable_metric_id: metric, limit: 2 }
  for await (const row of client.v1.usage.listWithGroups({ ...groups, group_key: ['region'] })) {
    console.log(row.group_value, shown(row.value))
  }

  try {
    await client.v1.usage.listWithGroups({ ...groups, group_key: ['color'] })
  } catch (error) {
    if (!(error instanceof Metronome.BadRequestError)) throw error
    console.log(`${error.constructor.name}: ${error.message}`)
  }
}

try {
  const catalog = await createCatalog()
  console.log(`sent ${await send()} events`)
  await printUsage(catalog)
} catch (error) {
  if (!(error instanceof Metronome.APIError)) throw error
  // Without an answer there is no status, and the cause says why.
  const cause = error.cause?.cause?.message ?? error.cause?.message
  console.error(`failed at ${client.baseURL}: ${error.message}${cause ? ` (${cause})` : ''}`)
  process.exitCode = 1
}

// Makes the calls that it reads from standard input, a JSON array, with Metronome's Node SDK, and writes what each
// gave, as an array again: tests/test_metronome_go_node.py says what is called and what must come back.

import { text } from 'node:stream/consumers'
import Metronome from '@metronome/sdk'

let requests = 0
const client = new Metronome({
  fetch: (...one) => {
    requests++
    return fetch(...one)
  },
})

async function all(pages, shown) {
  const rows = []
  for await (const row of pages) rows.push(shown(row))
  return rows
}

const calls = {
  customer: async ({ params, options }) => (await client.v1.customers.create(params, options)).data.id,
  metric: async ({ params, options }) => (await client.v1.billableMetrics.create(params, options)).data.id,
  name: async ({ params }) => (await client.v1.customers.retrieve({ customer_id: params.id })).data.name,
  customers: ({ limit }) => all(client.v1.customers.list({ limit }), ({ id }) => ({ id })),
  ingest: async ({ params, options }) => {
    await client.v1.usage.ingest({ usage: params }, options)
    return null
  },
  usage: ({ params }) =>
    all(client.v1.usage.list(params), (row) => ({
      customer: row.customer_id,
      metric: row.billable_metric_id,
      start: row.start_timestamp,
      end: row.end_timestamp,
      value: row.value,
      groups: row.groups,
      typed: row.groups,
    })),
  groups: ({ params, limit }) =>
    all(client.v1.usage.listWithGroups({ ...params, limit }), (row) => ({
      start: row.starting_on,
      key: row.group_key,
      group: row.group_value,
      value: row.value,
      all: row.group,
    })),
  search: async ({ params }) =>
    (await client.v1.usage.search(params)).map((row) => ({
      id: row.transaction_id,
      customer: row.matched_customer?.id ?? '',
    })),
}

const outcomes = []
for (const { do: name, key, ...one } of JSON.parse(await text(process.stdin))) {
  requests = 0
  const outcome = {}
  try {
    outcome.result = await calls[name]({ ...one, options: key ? { headers: { 'Idempotency-Key': key } } : {} })
  } catch (error) {
    if (!(error instanceof Metronome.APIError)) throw error
    // The types of the SDK, by the names under which it exports them.
    const type = Object.keys(Metronome).find((name) => Metronome[name] === error.constructor)
    outcome.error = { type, status: error.status, message: error.error?.message ?? error.message }
  }
  outcomes.push({ ...outcome, requests })
}
console.log(JSON.stringify(outcomes))

// Makes the calls that it reads from standard input, a JSON array, with Metronome's Go SDK, and writes what each
// gave, as an array again: tests/test_metronome_go_node.py says what is called and what must come back.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/Metronome-Industries/metronome-go"
	"github.com/Metronome-Industries/metronome-go/option"
	"github.com/Metronome-Industries/metronome-go/packages/respjson"
)

type call struct {
	Do     string
	Params json.RawMessage
	Limit  int64
	Key    string
}

type row = map[string]any

var requests int

func main() {
	var calls []call
	must(json.NewDecoder(os.Stdin).Decode(&calls))
	client := metronome.NewClient(option.WithMiddleware(
		func(request *http.Request, next option.MiddlewareNext) (*http.Response, error) {
			requests++
			return next(request)
		},
	))
	outcomes := []row{}
	for _, one := range calls {
		requests = 0
		result, err := do(client, one)
		outcome := row{"requests": requests}
		if err != nil {
			outcome["error"] = told(err)
		} else {
			outcome["result"] = result
		}
		outcomes = append(outcomes, outcome)
	}
	must(json.NewEncoder(os.Stdout).Encode(outcomes))
}

func do(client metronome.Client, one call) (any, error) {
	ctx, with := context.Background(), []option.RequestOption{}
	if one.Key != "" {
		with = append(with, option.WithHeader("Idempotency-Key", one.Key))
	}
	rows := []row{}
	switch one.Do {
	case "customer":
		params := read[metronome.V1CustomerNewParams](one)
		made, err := client.V1.Customers.New(ctx, params, with...)
		if err != nil {
			return nil, err
		}
		return made.Data.ID, nil
	case "metric":
		params := read[metronome.V1BillableMetricNewParams](one)
		made, err := client.V1.BillableMetrics.New(ctx, params, with...)
		if err != nil {
			return nil, err
		}
		return made.Data.ID, nil
	case "name":
		params := read[struct{ ID string }](one)
		found, err := client.V1.Customers.Get(ctx, metronome.V1CustomerGetParams{CustomerID: params.ID})
		if err != nil {
			return nil, err
		}
		return found.Data.Name, nil
	case "customers":
		found := client.V1.Customers.ListAutoPaging(ctx, metronome.V1CustomerListParams{Limit: metronome.Int(one.Limit)})
		for found.Next() {
			rows = append(rows, row{"id": found.Current().ID})
		}
		return rows, found.Err()
	case "ingest":
		return nil, client.V1.Usage.Ingest(ctx, read[metronome.V1UsageIngestParams](one), with...)
	case "usage":
		found := client.V1.Usage.ListAutoPaging(ctx, read[metronome.V1UsageListParams](one))
		for found.Next() {
			at := found.Current()
			shown := row{
				"customer": at.CustomerID,
				"metric":   at.BillableMetricID,
				"start":    at.StartTimestamp.Format(time.RFC3339),
				"end":      at.EndTimestamp.Format(time.RFC3339),
				"value":    number(at.Value, at.JSON.Value),
			}
			if at.JSON.Groups.Valid() {
				// The SDK's own map has 0 for null; what was sent is beside it.
				shown["groups"] = json.RawMessage(at.JSON.Groups.Raw())
				shown["typed"] = at.Groups
			}
			rows = append(rows, shown)
		}
		return rows, found.Err()
	case "groups":
		params := read[metronome.V1UsageListWithGroupsParams](one)
		if one.Limit != 0 {
			params.Limit = metronome.Int(one.Limit)
		}
		found := client.V1.Usage.ListWithGroupsAutoPaging(ctx, params)
		for found.Next() {
			at := found.Current()
			rows = append(rows, row{
				"start": at.StartingOn.Format(time.RFC3339),
				"key":   text(at.GroupKey, at.JSON.GroupKey),
				"group": text(at.GroupValue, at.JSON.GroupValue),
				"value": number(at.Value, at.JSON.Value),
			})
		}
		return rows, found.Err()
	case "search":
		found, err := client.V1.Usage.Search(ctx, read[metronome.V1UsageSearchParams](one))
		if err != nil {
			return nil, err
		}
		for _, at := range *found {
			rows = append(rows, row{"id": at.TransactionID, "customer": at.MatchedCustomer.ID})
		}
		return rows, nil
	}
	panic("there is no call " + one.Do)
}

func read[T any](one call) T {
	var params T
	must(json.Unmarshal(one.Params, &params))
	return params
}

// A field that is not there, or of another type than the SDK's, must not pass for null.
func number(value float64, field respjson.Field) any { return present(value, field) }
func text(value string, field respjson.Field) any    { return present(value, field) }

func present[T any](value T, field respjson.Field) any {
	switch {
	case field.Valid():
		return value
	case field.Raw() == respjson.Null:
		return nil
	}
	return fmt.Sprintf("neither a value nor null: %q", field.Raw())
}

func told(err error) row {
	var known *metronome.Error
	if !errors.As(err, &known) {
		return row{"type": fmt.Sprintf("%T", err), "message": err.Error()}
	}
	var body struct{ Message string }
	must(json.Unmarshal([]byte(known.RawJSON()), &body))
	return row{"type": "metronome.Error", "status": known.StatusCode, "message": body.Message}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

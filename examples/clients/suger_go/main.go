// Validates usage, reports it and lists it again, with Suger's SDK asking metering in place of Suger.
//
//	metering serve --gateway 127.0.0.1:8080    # in another terminal: JSON is answered at the gateway
//	python examples/clients/suger_fixture.py   # makes the buyer, the product, the metric and the entitlement
//	cd examples/clients/suger_go
//	go run .                                   # as often as you like: nothing counts twice
//
// It calls SUGER_BASE_URL (http://127.0.0.1:8080) with SUGER_API_KEY, an API key of the service, and the organization
// SUGER_ORG_ID; a server without keys takes any. What it sends is what suger_python sends, under the same ids.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	suger "github.com/sugerio/suger-sdk-go"
)

const entitlement, buyer, partner = "example-entitlement", "example-buyer", "AWS"

var (
	org      = cmp.Or(os.Getenv("SUGER_ORG_ID"), "example-org")
	baseURL  = cmp.Or(os.Getenv("SUGER_BASE_URL"), "http://127.0.0.1:8080")
	statuses = []string{"CREATED", "DELETED", "INVALID", "REPORTED", "REPORT_PENDING", "REPORT_FAILED"}
	now      = time.Now().UTC().Truncate(time.Second)
	today    = now.Format(time.DateOnly)

	// v1: by a dimension's key or name. The SDK has single precision: what it cannot hold, it rounds before it sends.
	records = map[string]float32{"cpu": 1.5, "Memory": 4}
	// v2: by billable metric.
	calls = []suger.MeteringUsageRecord{{
		Key:        suger.PtrString("example-calls"),
		Properties: map[string]interface{}{"region": "eu"},
		Quantity:   suger.PtrFloat32(3.25),
	}}
)

// notes are what is known about a group beside its records: they are kept as they are, and can be found by.
func notes() *suger.MeteringUsageRecordGroupMetaInfo {
	return &suger.MeteringUsageRecordGroupMetaInfo{
		SkipValidation:                        suger.PtrBool(false),
		LagoAmount:                            suger.PtrFloat32(12.5),
		LagoSubscriptionID:                    suger.PtrString("example-subscription"),
		LagoUsageStartTime:                    suger.PtrTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)),
		MetronomeDailyCostAmount:              suger.PtrFloat32(0.25),
		MetronomeMonthlyInvoiceAmount:         suger.PtrFloat32(250),
		MetronomeMonthlyInvoiceAmountAdjusted: suger.PtrFloat32(240.5),
		Source:                                suger.UsageRecordGroupSourceMETRONOME.Ptr(),
	}
}

// validate asks if groups would be taken: nothing is stored.
func validate(ctx context.Context, metering *suger.MeteringAPIService) error {
	v1 := suger.NewUsageRecordGroup{EntitlementID: entitlement, Records: records, Timestamp: &now, MetaInfo: notes()}
	v1.MetaInfo.OriginRecords = &records
	v1.MetaInfo.Timestamp = &now
	v2 := suger.NewUsageRecordGroup{EntitlementID: entitlement, BillableRecords: calls, Timestamp: &now, MetaInfo: notes()}
	v2.Records = map[string]float32{} // the SDK wants it; empty is none
	v2.MetaInfo.BillableRecords = calls
	v2.MetaInfo.Timestamp = &now
	// The SDK gives the body as it came, so the empty string still has its quotes: rely on the error.
	data := []suger.NewUsageRecordGroup{v1, v2}
	if _, _, err := metering.BatchValidateUsageRecordGroups(ctx, org).Data(data).Execute(); err != nil {
		return err
	}
	fmt.Println("valid")
	wrong := []suger.NewUsageRecordGroup{{EntitlementID: entitlement, Records: map[string]float32{"gpu": 1}}}
	_, response, err := metering.BatchValidateUsageRecordGroups(ctx, org).Data(wrong).Execute()
	if err == nil || response == nil || response.StatusCode != 400 {
		return err
	}
	fmt.Println("not valid:", message(err))
	return nil
}

// report reports the groups. Under their ids a retry, or another run on the same day, counts nothing twice. Without a
// timestamp it is usage of now, whenever that is: it does not make a retry another group.
func report(ctx context.Context, metering *suger.MeteringAPIService) error {
	cpu := suger.CreateUsageRecordGroupParams{
		OrganizationID: org, EntitlementID: entitlement, Id: suger.PtrString("example-cpu-" + today),
		Records: records, MetaInfo: notes(),
	}
	cpu.MetaInfo.OriginRecords = &records
	v2 := suger.CreateUsageRecordGroupParams{
		OrganizationID: org, EntitlementID: entitlement, Id: suger.PtrString("example-calls-" + today),
		Records: map[string]float32{}, BillableRecords: calls, MetaInfo: notes(),
	}
	v2.MetaInfo.BillableRecords = calls
	for _, group := range []suger.CreateUsageRecordGroupParams{cpu, v2} {
		stored, _, err := metering.ReportUsageRecordGroup(ctx, org, entitlement).Data(group).Execute()
		if err != nil {
			return err
		}
		fmt.Println("reported", shown(stored))
	}
	return nil
}

type listing = suger.ApiListUsageRecordGroupsRequest

// list lists the groups of today, page by page; of partner, buyer and entitlement there may be one.
func list(ctx context.Context, metering *suger.MeteringAPIService, whose string, of func(listing) listing) error {
	for _, status := range statuses {
		for offset := int32(0); ; {
			page, _, err := of(metering.ListUsageRecordGroups(ctx, org)).
				Status(status).
				Source("METRONOME").
				MetaInfo(`{"lagoSubscriptionID":"example-subscription","lagoAmount":12.5}`).
				StartDate(today).
				EndDate(today).
				Limit(1).
				Offset(offset).
				Execute()
			if err != nil {
				return err
			}
			for _, group := range page.UsageRecordGroups {
				fmt.Printf("of %s: %s\n", whose, shown(&group))
			}
			if page.NextOffset == nil { // on the last page
				break
			}
			offset = *page.NextOffset
		}
	}
	return nil
}

// shown is a group in a line.
func shown(group *suger.MeteringUsageRecordGroup) string {
	used := maps.Clone(group.GetRecords())
	for _, one := range group.MetaInfo.BillableRecords {
		used[one.GetKey()] = one.GetQuantity()
	}
	text := group.GetId() + ":"
	for _, key := range slices.Sorted(maps.Keys(used)) {
		text += fmt.Sprintf(" %s=%g", key, used[key])
	}
	return text
}

// message is what the service said: errors are JSON strings.
func message(err error) string {
	var failed *suger.GenericOpenAPIError
	var text string
	if errors.As(err, &failed) && json.Unmarshal(failed.Body(), &text) == nil {
		return text
	}
	return err.Error()
}

func run() error {
	configuration := suger.NewConfiguration()
	// The SDK's own address is broken (//https://api.suger.cloud); it has to be set in any case.
	configuration.Servers = suger.ServerConfigurations{{URL: baseURL}}
	metering := suger.NewAPIClient(configuration).MeteringAPI
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	key := suger.APIKey{Key: cmp.Or(os.Getenv("SUGER_API_KEY"), "any"), Prefix: "Key"}
	ctx = context.WithValue(ctx, suger.ContextAPIKeys, map[string]suger.APIKey{"APIKeyAuth": key})
	if err := validate(ctx, metering); err != nil {
		return err
	}
	if err := report(ctx, metering); err != nil {
		return err
	}
	for _, by := range []struct {
		whose string
		of    func(listing) listing
	}{
		{partner, func(call listing) listing { return call.Partner(partner) }},
		{buyer, func(call listing) listing { return call.BuyerId(buyer) }},
		{entitlement, func(call listing) listing { return call.EntitlementId(entitlement) }},
	} {
		if err := list(ctx, metering, by.whose, by.of); err != nil {
			return err
		}
	}
	return nil
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "failed at %s: %s\n", baseURL, message(err))
		os.Exit(1)
	}
}

// Streams a month of events in and its usage out. A broken connection costs a resend, never a number.
//
//	metering serve                            # in another terminal
//	cd examples/go
//	pip install buf-bin && go generate        # the stubs, from ../../protos into gen/; any buf will do
//	go run .                                  # as often as you like: nothing counts twice
//
// It calls METERING_ADDRESS (localhost:50051) with METERING_API_KEY, if there is one.
package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math/big"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "example/metering/gen/metering/v1"
)

//go:generate buf generate

// Ids of our own make creations safe to retry. Yours come from where you keep your customers.
const metricID = "6f1c2a52-5d0e-4f7b-9c57-0a1b8a3d9e10"

var (
	customers = []*pb.Customer{ // events name them by the alias
		{Id: "0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c101", Name: "globex", IngestAliases: []string{"globex"}},
		{Id: "0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c102", Name: "initech", IngestAliases: []string{"initech"}},
		{Id: "0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c103", Name: "umbrella", IngestAliases: []string{"umbrella"}},
	}
	start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	end   = start.AddDate(0, 1, 0)
	// Some of these were never begun, of others the outcome is unknown, and proxies turn broken connections into
	// Internal and Unknown: do the same again. Anything else, such as a bad field or key, would only fail again.
	// FailedPrecondition: a metric just created may still be counting the events of the past.
	retryable = []codes.Code{codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted,
		codes.ResourceExhausted, codes.Internal, codes.Unknown, codes.FailedPrecondition}
	errCut = status.Error(codes.Unavailable, "the stream ended before its end")
)

// retry tries until it succeeds, later after each failure in a row, and gives up at the seventh. A try calls progress
// when it got on. Its deadline also ends a call whose connection went silent; a stream that it cuts is resumed.
func retry(ctx context.Context, what string, try func(ctx context.Context, progress func()) error) error {
	failures := 0
	for {
		limited, cancel := context.WithTimeout(ctx, time.Minute)
		err := try(limited, func() { failures = 0 })
		cancel()
		if err == nil {
			return nil
		}
		if failures++; failures > 6 || !slices.Contains(retryable, status.Code(err)) {
			return fmt.Errorf("%s: %w", what, err)
		}
		// With jitter: clients that failed together must not come back together.
		wait := time.Duration((0.5 + rand.Float64()/2) * float64(min(5*time.Second, 100*time.Millisecond<<failures)))
		fmt.Fprintf(os.Stderr, "%s: again in %v after %v\n", what, wait.Round(time.Millisecond), err)
		time.Sleep(wait)
	}
}

// createCatalog creates the metric, which says what counts, and the customers for whom it counts. Again changes nothing.
func createCatalog(ctx context.Context, connection *grpc.ClientConn) error {
	request := &pb.CreateBillableMetricRequest{BillableMetric: &pb.BillableMetric{
		Id:              metricID,
		Name:            "Example downloads",
		AggregationType: pb.AggregationType_AGGREGATION_TYPE_SUM,
		AggregationKey:  "bytes",
		EventTypeFilter: &pb.EventTypeFilter{InValues: []string{"download"}},
	}}
	return retry(ctx, "creating", func(ctx context.Context, _ func()) error {
		_, err := pb.NewBillableMetricServiceClient(connection).CreateBillableMetric(ctx, request)
		for _, customer := range customers {
			if err == nil {
				request := &pb.CreateCustomerRequest{Customer: customer}
				_, err = pb.NewCustomerServiceClient(connection).CreateCustomer(ctx, request)
			}
		}
		return err
	})
}

// makeEvents makes a download per customer and hour, in place of what your service has seen.
func makeEvents() (events []*pb.UsageEvent) {
	for at := start; at.Before(end); at = at.Add(time.Hour) {
		for i, customer := range customers {
			// A string is exact at any length; a JSON number only as far as a double is.
			bytes := structpb.NewStringValue(strconv.Itoa(1000*at.Day() + 10*at.Hour() + i + 1))
			events = append(events, &pb.UsageEvent{
				// Made of what identifies the fact, so the same after a crash. A random id must be kept with its event.
				TransactionId: fmt.Sprintf("download-%s-%d", customer.Name, int(at.Sub(start).Hours())),
				CustomerId:    customer.Name,
				EventType:     "download",
				Timestamp:     timestamppb.New(at),
				Properties:    &structpb.Struct{Fields: map[string]*structpb.Value{"bytes": bytes}},
			})
		}
	}
	return events
}

// send streams events in batches, sends again what was not answered when a stream broke, and counts what is stored.
func send(ctx context.Context, connection *grpc.ClientConn, events []*pb.UsageEvent) (stored int, err error) {
	batches := slices.Collect(slices.Chunk(events, 200))
	answered := 0
	err = retry(ctx, "sending", func(ctx context.Context, progress func()) error {
		stream, err := pb.NewEventServiceClient(connection).StreamEvents(ctx)
		if err != nil {
			return err
		}
		go func(left [][]*pb.UsageEvent) {
			for i, batch := range left { // every stream counts from 1
				if stream.Send(&pb.StreamEventsRequest{Sequence: int64(i + 1), Events: batch}) != nil {
					return // Recv says why
				}
			}
			_ = stream.CloseSend()
		}(batches[answered:])
		for {
			answer, err := stream.Recv()
			if err == io.EOF && answered == len(batches) {
				return nil
			} else if err == io.EOF {
				return errCut
			} else if err != nil {
				return err
			}
			for _, issue := range answer.Issues { // the fault of one event; the others are stored all the same
				id := batches[answered][issue.Index].TransactionId
				fmt.Fprintf(os.Stderr, "not stored: %s: %s: %s\n", id, issue.Field, issue.Message)
			}
			for _, verdict := range answer.Verdicts { // stored now, or by a call before
				if verdict == pb.Verdict_VERDICT_ACCEPTED || verdict == pb.Verdict_VERDICT_DUPLICATE {
					stored++
				}
			}
			answered++ // answers come in the order of the batches
			progress()
		}
	})
	return stored, err
}

// totalPerDay streams the usage of every hour, and resumes after the last message received until one is complete.
func totalPerDay(ctx context.Context, connection *grpc.ClientConn) (map[string]*big.Rat, error) {
	request := &pb.StreamUsageRequest{
		BillableMetrics: []*pb.BillableMetricSelector{{Id: metricID}},
		WindowSize:      pb.WindowSize_WINDOW_SIZE_HOUR,
		StartingOn:      timestamppb.New(start),
		EndingBefore:    timestamppb.New(end),
	}
	for _, customer := range customers {
		request.CustomerIds = append(request.CustomerIds, customer.Id)
	}
	totals, windows := map[string]*big.Rat{}, 0
	err := retry(ctx, "reading", func(ctx context.Context, progress func()) error {
		if request.ResumeToken != "" {
			fmt.Fprintf(os.Stderr, "resuming after %d windows\n", windows)
		}
		stream, err := pb.NewUsageServiceClient(connection).StreamUsage(ctx, request)
		if err != nil {
			return err
		}
		for {
			message, err := stream.Recv()
			if err == io.EOF {
				return errCut
			} else if err != nil {
				return err
			}
			for _, window := range message.Windows {
				day := window.StartingOn.AsTime().Format(time.DateOnly)
				if totals[day] == nil {
					totals[day] = new(big.Rat)
				}
				if window.Value != nil { // nil is "no usage"; values are exact decimals, which a float64 is not
					value, ok := new(big.Rat).SetString(*window.Value)
					if !ok {
						return status.Errorf(codes.DataLoss, "not a number: %q", *window.Value)
					}
					totals[day].Add(totals[day], value)
				}
			}
			windows += len(message.Windows)
			// A program that keeps its totals in a database writes the token there in the same transaction.
			request.ResumeToken = message.ResumeToken
			progress()
			if message.Complete {
				return nil
			}
		}
	})
	return totals, err
}

func run(ctx context.Context, address string) error {
	if key := os.Getenv("METERING_API_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	if err := createCatalog(ctx, connection); err != nil {
		return err
	}
	events := makeEvents()
	stored, err := send(ctx, connection, events)
	if err != nil {
		return err
	}
	fmt.Printf("stored %d of %d events\n", stored, len(events))
	totals, err := totalPerDay(ctx, connection)
	if err != nil {
		return err
	}
	sum := new(big.Rat)
	for _, day := range slices.Sorted(maps.Keys(totals)) {
		fmt.Println(day, decimal(totals[day]))
		sum.Add(sum, totals[day])
	}
	fmt.Println("total", decimal(sum))
	if stored < len(events) {
		return fmt.Errorf("some events were not stored, see above")
	}
	return nil
}

// decimal writes all of up to 18 digits after the point.
func decimal(value *big.Rat) string {
	return strings.TrimRight(strings.TrimRight(value.FloatString(18), "0"), ".")
}

func main() {
	address := cmp.Or(os.Getenv("METERING_ADDRESS"), "localhost:50051")
	if err := run(context.Background(), address); err != nil {
		fmt.Fprintf(os.Stderr, "failed at %s: %v\n", address, err)
		os.Exit(1)
	}
}

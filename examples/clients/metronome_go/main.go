// Prints the usage of today, of all customers by all metrics: the program of Metronome's API reference, `Get batched
// usage data`, asking metering in place of Metronome.
//
//	metering serve --gateway 127.0.0.1:8080   # in another terminal
//	cd examples/clients/metronome_go
//	go run .
//
// It calls METRONOME_BASE_URL (http://localhost:8080) with METRONOME_BEARER_TOKEN, an API key; a server without keys
// takes any. These two options were added to the program, and `metronome.F(…)` around the parameters was taken away:
// version 1 of the SDK has it no more. metronome_go_printed beside it is the program to the letter.
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/Metronome-Industries/metronome-go"
	"github.com/Metronome-Industries/metronome-go/option"
)

func main() {
	client := metronome.NewClient(
		option.WithBaseURL(cmp.Or(os.Getenv("METRONOME_BASE_URL"), "http://localhost:8080")),
		option.WithBearerToken(cmp.Or(os.Getenv("METRONOME_BEARER_TOKEN"), "My Bearer Token")),
	)
	// Both bounds are inside of today, which they mean: unless the server runs with strict windows.
	usages, err := client.V1.Usage.List(context.TODO(), metronome.V1UsageListParams{
		EndingBefore: time.Now(),
		StartingOn:   time.Now(),
		WindowSize:   metronome.V1UsageListParamsWindowSize("day"),
	})
	if err != nil {
		panic(err.Error())
	}
	fmt.Printf("%+v\n", usages.Data)
}

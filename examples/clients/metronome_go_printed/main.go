// The program of Metronome's API reference, `Get batched usage data`, as it is printed there: not a word is changed. Its
// SDK finds metering by METRONOME_BASE_URL:
//
//	metering serve --gateway 127.0.0.1:8080   # in another terminal
//	cd examples/clients/metronome_go_printed
//	METRONOME_BASE_URL=http://localhost:8080 go run .
//
// It was written for the first version of the SDK; metronome_go beside it is the same for the present one.
package main

import (
	"context"
	"fmt"
	"time"

	"github.com/Metronome-Industries/metronome-go"
	"github.com/Metronome-Industries/metronome-go/option"
)

func main() {
	client := metronome.NewClient(
		option.WithBearerToken("My Bearer Token"),
	)
	usages, err := client.V1.Usage.List(context.TODO(), metronome.V1UsageListParams{
		EndingBefore: metronome.F(time.Now()),
		StartingOn:   metronome.F(time.Now()),
		WindowSize:   metronome.F(metronome.V1UsageListParamsWindowSize("day")),
	})
	if err != nil {
		panic(err.Error())
	}
	fmt.Printf("%+v\n", usages.Data)
}

module example/suger

go 1.23.0

require github.com/sugerio/suger-sdk-go v0.0.0-20250311045930-43c293000758

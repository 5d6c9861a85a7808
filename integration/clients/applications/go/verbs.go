// A Go program that moves memory by RDMA while its runtime collects garbage, gives memory back and starts programs.
//
// It is built with loop.c and check.c of the directory above its own.
package main

/*
#cgo CFLAGS: -std=gnu11 -D_GNU_SOURCE
#cgo LDFLAGS: -libverbs -lpthread
#include "loop.h"
#include <stdlib.h>
*/
import "C"

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
	"unsafe"
)

const (
	rounds = 60
	length = 1 << 20
)

// Garbage for the collector, until the channel is closed.
func litter(stop chan struct{}, done *sync.WaitGroup) {
	defer done.Done()
	for {
		select {
		case <-stop:
			return
		default:
		}
		piles := make([][]byte, 64)
		for i := range piles {
			piles[i] = make([]byte, 32<<10)
			for _, b := range piles[i] {
				if b != 0 {
					fail("a new slice has old bytes")
				}
			}
			piles[i][i] = 1
		}
		runtime.GC()
		debug.FreeOSMemory()
		time.Sleep(5 * time.Millisecond)
	}
}

func fail(what string) {
	fmt.Fprintln(os.Stderr, what)
	os.Exit(1)
}

// Moves `from` to `to`, which are registered for it alone.
func move(loop *C.struct_loop, to, from []byte) {
	source := C.loop_reg(loop, unsafe.Pointer(&from[0]), C.size_t(len(from)))
	target := C.loop_reg(loop, unsafe.Pointer(&to[0]), C.size_t(len(to)))
	C.loop_write(loop, target, unsafe.Pointer(&to[0]), source, unsafe.Pointer(&from[0]), C.uint32_t(len(from)))
	C.loop_dereg(source)
	C.loop_dereg(target)
}

func main() {
	loop := C.loop_open()
	stop := make(chan struct{})
	var done sync.WaitGroup
	for i := 0; i < 2; i++ {
		done.Add(1)
		go litter(stop, &done)
	}
	memory := C.calloc(2, length)
	outside := unsafe.Slice((*byte)(memory), 2*length)
	for round := 0; round < rounds; round++ {
		for i := 0; i < length; i++ {
			outside[i] = byte(round + i)
		}
		move(&loop, outside[length:], outside[:length])
		if !bytes.Equal(outside[:length], outside[length:]) {
			fail("C's memory: other bytes")
		}
		// The collector does not move what it manages.
		own := make([]byte, 2*length)
		copy(own, outside[:length])
		move(&loop, own[length:], own[:length])
		if !bytes.Equal(own[length:], outside[:length]) {
			fail("Go's memory: other bytes")
		}
		if round%10 == 0 {
			if output, err := exec.Command("echo", "hello").Output(); err != nil || string(output) != "hello\n" {
				fail(fmt.Sprint("a program: ", err))
			}
		}
	}
	close(stop)
	done.Wait()
	C.loop_close(&loop)
	C.free(memory)
	fmt.Println("ok")
}

// SPDX-License-Identifier: Apache-2.0

package check

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// inNamespaces runs fn on a thread of its own that has left the process's namespaces for fresh ones (flags:
// unix.CLONE_NEWNET, unix.CLONE_NEWNS). The thread is not handed back to the scheduler: it ends with fn, and with it
// its namespaces and everything in them, also when the process is killed meanwhile.
func inNamespaces(flags int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc/PID/ns of the whole process follows it: it must not go there.
			// While it is held here, the goroutine below gets another one.
			defer runtime.UnlockOSThread()
			done <- inNamespaces(flags, fn)
			return
		}
		// No UnlockOSThread: the runtime ends a thread whose goroutine ends while it is locked.
		done <- func() (err error) {
			defer func() { // see runOne
				if r := recover(); r != nil {
					err = fmt.Errorf("the probe broke off: %v", r)
				}
			}()
			if err := unix.Unshare(flags); err != nil {
				return fmt.Errorf("new namespace: %w", err)
			}
			if flags&unix.CLONE_NEWNS != 0 {
				if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
					return fmt.Errorf("make mounts private: %w", err)
				}
			}
			return fn()
		}()
	}()
	return <-done
}

// tryClone creates a process in fresh namespaces that ends at once: it is told to execute a path that cannot exist,
// so that the error for that path proves that everything before it, clone and identity mapping, has worked.
func tryClone(attr *syscall.SysProcAttr) error {
	_, err := syscall.ForkExec("/dev/null/none", []string{"none"}, &syscall.ProcAttr{Sys: attr})
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENOENT):
		return nil
	case err == nil:
		return errors.New("a path below /dev/null was executable")
	}
	return err
}

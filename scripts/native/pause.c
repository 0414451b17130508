/* SPDX-License-Identifier: Apache-2.0 */

/*
 * The program of the pause image: it holds a pod's namespaces, and with a
 * shared process namespace it is the pod's init.
 *
 * All signals stay blocked and are taken from the queue one by one, so there
 * is no handler and no race between looking and sleeping. (A blocked signal is
 * queued for process 1 too; an unblocked one without a handler is dropped.)
 */
#include "syscall.h"

enum { SIGINT = 2, SIGTERM = 15, SIGCHLD = 17, SIG_BLOCK = 0, WNOHANG = 1 };

__attribute__((noreturn, used)) void start(void)
{
	const unsigned long all = ~0UL;

	syscall4(SYS_rt_sigprocmask, SIG_BLOCK, (long)&all, 0, sizeof all);
	for (;;) {
		long sig = syscall4(SYS_rt_sigtimedwait, (long)&all, 0, 0, sizeof all);

		if (sig == SIGTERM || sig == SIGINT)
			exit_group(0);
		if (sig == SIGCHLD)
			while (syscall4(SYS_wait4, -1, 0, WNOHANG, 0) > 0)
				;
	}
}

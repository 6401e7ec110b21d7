/* child.h: what a test needs that forks, or looks at a descriptor. Include it after the header under test.

   REQUIRE       in a child: return the line of what was not, to be its exit status
   end_of_child  how it ended: the exit status; 1000 and the signal, so 1014 is one that hung; -1 if it cannot be told
   readable      whether a descriptor is, at the moment */
#ifndef CHILD_H
#define CHILD_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/wait.h>

#define REQUIRE(expr)                 \
    do {                              \
        if (!(expr)) return __LINE__; \
    } while (0)

static inline __attribute__((unused)) int end_of_child(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) return -1;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
}

static inline __attribute__((unused)) bool readable(int fd) {
    struct pollfd poller;
    poller.fd = fd;
    poller.events = POLLIN;
    return poll(&poller, 1, 0) == 1;
}

#endif /* CHILD_H */

/* treesum against find, xargs and sha256sum over the same tree, warm: `bench_treesum TREESUM TREE`. */
#include "bench.h"
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* Milliseconds that a command takes, its output thrown away. */
static double run(char *const argv[]) {
    posix_spawn_file_actions_t actions;
    pid_t pid;
    int status;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    uint64_t began = bench_now();
    bench_check(posix_spawnp(&pid, argv[0], &actions, NULL, argv, environ) == 0, "a command does not start");
    bench_check(waitpid(pid, &status, 0) == pid, "a command is lost");
    uint64_t spent = bench_now() - began;
    posix_spawn_file_actions_destroy(&actions);
    bench_check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a command failed");
    return (double)spent / 1e6;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: bench_treesum TREESUM TREE\n");
        return 2;
    }
    /* The path is an argument of the shell, not part of its program. */
    char shell[] = "sh", dash_c[] = "-c", name[] = "bench", quiet[] = "-q";
    char pipeline[] = "find \"$1\" -type f -print0 | xargs -0 -P2 -n32 sha256sum";
    char *const by_hand[] = {shell, dash_c, pipeline, name, argv[2], NULL};
    char *const treesum[] = {argv[1], quiet, argv[2], NULL};
    if (!bench_wants("treesum") && !bench_wants("xargs_sha256sum")) return 0;
    run(by_hand); /* warms the cache */
    bench_print("treesum", run(treesum), "ms");
    bench_print("xargs_sha256sum", run(by_hand), "ms");
    return 0;
}

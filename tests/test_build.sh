#!/bin/sh
# Every way in which ctxcancel.h may stand in a program: which files include what, with which macros, in which language.
. tests/shell.sh

warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wundef -Werror"
inc="-I. -I$tmp"

cc() { $CC -std=c11 $warn -Wstrict-prototypes $inc -pthread "$@"; }
cxx() { $CXX -std=c++11 $warn $inc -pthread "$@"; }
file() { cat >"$tmp/$1"; }

# -- the pieces that programs are put together from ----------------------------------------------------------------

file impl.c <<'END'
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
END

file decl.c <<'END'
#include "ctxcancel.h"
int work(ctx_t *ctx);
int work(ctx_t *ctx) { return ctx_err(ctx); }
END

file main.c <<'END'
#include "ctxcancel.h"
int main(void) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    bool first = ctx_cancel(ctx);
    bool ok = first && ctx_err(ctx) == CTX_CANCELED;
    ctx_end(ctx);
    ctx_runtime_stop();
    return ok ? 0 : 1;
}
END

# The program's own use of stb_ds, arrays and both kinds of map.
file stb_user.c <<'END'
#include <stdlib.h>
#include <stb/stb_ds.h>
int stb_user(void);
int stb_user(void) {
    int *numbers = NULL;
    arrput(numbers, 7);
    int n = numbers[0];
    arrfree(numbers);
    return n;
}
END
{ echo '#define STB_DS_IMPLEMENTATION'; cat "$tmp/stb_user.c"; } >"$tmp/stb_owner.c"

file stb_main.c <<'END'
#include "ctxcancel.h"
int stb_user(void);
int main(void) {
    ctx_t *ctx = ctx_with_cancel(ctx_background());
    int n = stb_user();
    ctx_end(ctx);
    return n == 7 ? 0 : 1;
}
END

# Two files that each have a runtime of their own.
file static_a.c <<'END'
#define CTXCANCEL_STATIC
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
int other(void);
int main(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
    int rc = ctx_wait(ctx, CTX_S(10));
    ctx_end(ctx);
    ctx_runtime_stop();
    return rc == CTX_DEADLINE_EXCEEDED && other() == CTX_DEADLINE_EXCEEDED ? 0 : 1;
}
END

file static_b.c <<'END'
#define CTXCANCEL_STATIC
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
int other(void);
int other(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_MS(1));
    int rc = ctx_wait(ctx, CTX_S(10));
    ctx_end(ctx);
    ctx_runtime_stop();
    return rc;
}
END

# Two files that share a value by a header.
file request.h <<'END'
#include "ctxcancel.h"
typedef struct { int user; } request_t;
CTX_VALUE(request_t, request);
int user_of(const ctx_t *ctx);
END

file value_a.c <<'END'
#include "request.h"
int main(void) {
    request_t request = {42};
    ctx_t *ctx = ctx_with_request(ctx_background(), &request);
    bool ok = user_of(ctx) == 42 && user_of(ctx_background()) == -1;
    ctx_end(ctx);
    return ok ? 0 : 1;
}
END

file value_b.c <<'END'
#include "request.h"
int user_of(const ctx_t *ctx) { return request_from(ctx) ? request_from(ctx)->user : -1; }
END

# Finds any attempt to include stb_ds.h.
mkdir -p "$tmp/poison/stb"
echo '#error "stb_ds.h was included"' | tee "$tmp/poison/stb_ds.h" >"$tmp/poison/stb/stb_ds.h"

# -- stb_ds --------------------------------------------------------------------------------------------------------

declarations_need_no_stb_ds() {
    for std in c99 c11 gnu17; do
        $CC -std=$std -isystem "$tmp/poison" -I. -c "$tmp/decl.c" -o "$tmp/decl.o"
    done
    $CC -I. -M "$tmp/decl.c" >"$tmp/includes"
    refuse grep stb_ds "$tmp/includes"
    # The poison works: the implementation does trip on it.
    refuse $CC -isystem "$tmp/poison" -I. -c "$tmp/impl.c" -o "$tmp/impl.o"
}

program_that_instantiates_stb_ds_elsewhere_links() {
    cc -DCTXCANCEL_NO_STB_DS_IMPLEMENTATION "$tmp/impl.c" "$tmp/stb_main.c" "$tmp/stb_owner.c" -o "$tmp/prog"
    "$tmp/prog"
}

program_may_use_our_stb_ds() {
    cc "$tmp/impl.c" "$tmp/stb_main.c" "$tmp/stb_user.c" -o "$tmp/prog"
    "$tmp/prog"
}

file_that_implements_stb_ds_above_us_builds() {
    cat "$tmp/stb_owner.c" - "$tmp/impl.c" >"$tmp/both.c" </dev/null
    cc -D_DEFAULT_SOURCE "$tmp/both.c" "$tmp/stb_main.c" -o "$tmp/prog"
    "$tmp/prog"
}

file_that_only_declares_stb_ds_above_us_builds() {
    cat "$tmp/stb_user.c" "$tmp/impl.c" >"$tmp/both.c"
    cc -D_DEFAULT_SOURCE "$tmp/both.c" "$tmp/stb_main.c" -o "$tmp/prog"
    "$tmp/prog"
}

file_that_implements_stb_ds_below_us_builds() {
    cat "$tmp/impl.c" "$tmp/stb_owner.c" >"$tmp/both.c"
    cc -DCTXCANCEL_NO_STB_DS_IMPLEMENTATION "$tmp/both.c" "$tmp/stb_main.c" -o "$tmp/prog"
    "$tmp/prog"
}

# -- several files in one program ----------------------------------------------------------------------------------

one_implementation_serves_many_files() {
    cc "$tmp/impl.c" "$tmp/main.c" "$tmp/decl.c" -o "$tmp/prog"
    "$tmp/prog"
}

file_may_include_declarations_and_then_the_implementation() {
    cat "$tmp/decl.c" "$tmp/impl.c" >"$tmp/late.c"
    cc -D_GNU_SOURCE "$tmp/late.c" "$tmp/main.c" -o "$tmp/prog"
    "$tmp/prog"
}

two_static_copies_live_in_one_program() {
    cc "$tmp/static_a.c" "$tmp/static_b.c" -o "$tmp/prog"
    timeout 20 "$tmp/prog"
}

static_copy_lives_beside_the_shared_one() {
    cc "$tmp/impl.c" "$tmp/main.c" "$tmp/static_b.c" -o "$tmp/prog"
    "$tmp/prog"
}

value_in_a_shared_header_is_one_key() {
    cc "$tmp/impl.c" "$tmp/value_a.c" "$tmp/value_b.c" -o "$tmp/prog"
    "$tmp/prog"
}

# -- C++ -----------------------------------------------------------------------------------------------------------

c_and_cpp_files_link_and_share_a_key() {
    cp "$tmp/value_b.c" "$tmp/value_b.cpp"
    sed -i 's/#include "request.h"/extern "C" {\n#include "request.h"\n}/' "$tmp/value_b.cpp"
    cc -c "$tmp/impl.c" -o "$tmp/impl.o"
    cc -c "$tmp/value_a.c" -o "$tmp/value_a.o"
    cxx "$tmp/impl.o" "$tmp/value_a.o" "$tmp/value_b.cpp" -o "$tmp/prog"
    "$tmp/prog"
}

implementation_compiled_as_cpp_serves_c() {
    cp "$tmp/impl.c" "$tmp/impl.cpp"
    cxx -c "$tmp/impl.cpp" -o "$tmp/impl_cpp.o"
    cc -c "$tmp/main.c" -o "$tmp/main.o"
    cxx "$tmp/impl_cpp.o" "$tmp/main.o" -o "$tmp/prog"
    "$tmp/prog"
}

# -- plugins -------------------------------------------------------------------------------------------------------

# A program and the plugin that it loads, both compiled with hidden visibility, share a key by a header.
file plugin.c <<'END'
#include "request.h"
__attribute__((visibility("default"))) int user_of(const ctx_t *ctx) {
    return request_from(ctx) ? request_from(ctx)->user : -1;
}
END

file loader.c <<'END'
#include <dlfcn.h>
#include <string.h>
#include "request.h"
int main(int argc, char **argv) {
    request_t request = {42};
    ctx_t *ctx = ctx_with_request(ctx_background(), &request);
    void *plugin = dlopen(argv[argc - 1], RTLD_NOW | RTLD_LOCAL);
    void *symbol = plugin ? dlsym(plugin, "user_of") : NULL;
    int (*fn)(const ctx_t *ctx) = NULL;
    int user;
    memcpy(&fn, &symbol, sizeof fn);
    user = fn ? fn(ctx) : -2;
    ctx_end(ctx);
    ctx_runtime_stop();
    return user == 42 ? 0 : 1;
}
END

plugin_shares_a_key_despite_hidden_visibility() {
    cc -fPIC -fvisibility=hidden -shared "$tmp/plugin.c" -o "$tmp/plugin.so"
    cc -fPIC -c "$tmp/impl.c" -o "$tmp/impl_pic.o"
    cc -fPIC -fvisibility=hidden "$tmp/loader.c" "$tmp/impl_pic.o" -rdynamic -ldl -o "$tmp/prog"
    "$tmp/prog" "$tmp/plugin.so"
    # The library may also be a shared object of its own.
    cc -fPIC -shared "$tmp/impl_pic.o" -o "$tmp/libplugged.so"
    cc -fPIC -fvisibility=hidden "$tmp/loader.c" -rdynamic -L"$tmp" -lplugged -Wl,-rpath,"$tmp" -ldl -o "$tmp/prog"
    "$tmp/prog" "$tmp/plugin.so"
}

# -- macros --------------------------------------------------------------------------------------------------------

# POSIX functions are hidden when a strict program included a system header before us: that must build all the same,
# or say which flag to add.
late_include_in_strict_c_works_or_says_what_to_do() {
    { echo '#include <stdio.h>'; cat "$tmp/impl.c"; } >"$tmp/strict.c"
    if ! $CC -std=c99 -I. -pthread -c "$tmp/strict.c" -o "$tmp/strict.o" 2>"$tmp/err"; then
        grep 'error:' "$tmp/err" | head -n 1 | grep '_DEFAULT_SOURCE'
        $CC -std=c99 -D_DEFAULT_SOURCE -I. -pthread -c "$tmp/strict.c" -o "$tmp/strict.o"
    fi
}

# Where a program asks for POSIX of 2008 and no more, the implementation gets along with that, wherever it stands. It
# raises an older POSIX if it comes first, else it says which flag to add.
asking_for_posix_alone_builds() {
    { echo '#include <stdio.h>'; echo '#include <stdlib.h>'; cat "$tmp/impl.c"; } >"$tmp/posix_late.c"
    for std in gnu11 c11; do
        for level in -D_POSIX_C_SOURCE=200809L -D_XOPEN_SOURCE=700; do
            for order in impl posix_late; do
                $CC -std=$std $level $warn -I. -pthread -c "$tmp/$order.c" -o "$tmp/posix.o"
            done
        done
    done
    $CC -std=gnu11 -D_POSIX_C_SOURCE=200809L -I. -pthread "$tmp/posix.o" "$tmp/main.c" -o "$tmp/prog"
    "$tmp/prog"
    $CC -std=gnu11 -D_POSIX_C_SOURCE=200112L $warn -I. -pthread -c "$tmp/impl.c" -o "$tmp/posix.o"
    refuse $CC -std=gnu11 -D_XOPEN_SOURCE=600 -I. -pthread -c "$tmp/posix_late.c" -o "$tmp/posix.o" 2>"$tmp/err"
    grep 'error:.*-D_DEFAULT_SOURCE' "$tmp/err"
    $CC -std=gnu11 -D_XOPEN_SOURCE=600 -D_DEFAULT_SOURCE $warn -I. -pthread -c "$tmp/posix_late.c" -o "$tmp/posix.o"
}

declarations_compile_after_any_header_in_strict_c() {
    { echo '#include <stdio.h>'; cat "$tmp/decl.c"; } >"$tmp/strict.c"
    $CC -std=c99 -I. -c "$tmp/strict.c" -o "$tmp/strict.o"
}

linkage_can_be_chosen() {
    file shown.h <<'END'
#define CTXCANCEL_API __attribute__((visibility("default")))
#include "ctxcancel.h"
END
    cc -fvisibility=hidden -fPIC -shared -DCTXCANCEL_IMPLEMENTATION -x c "$tmp/shown.h" -o "$tmp/libshown.so"
    nm -D --defined-only "$tmp/libshown.so" >"$tmp/symbols"
    grep ' ctx_cancel$' "$tmp/symbols"
    refuse grep stbds "$tmp/symbols"
    cc "$tmp/main.c" -L"$tmp" -lshown -Wl,-rpath,"$tmp" -o "$tmp/prog"
    "$tmp/prog"
}

# Every macro that a program uses, in C and in C++.
file macros.c <<'END'
#include "request.h"
int macros(ctx_t *ctx, long n);
int macros(ctx_t *ctx, long n) {
    static const ctx_key_t key = CTX_KEY(long);
    ctx_leaf_t leaf;
    static ctx_desc_t desc;
    int number = 15;
    ctx_dur_t spans = CTX_NS(n) + CTX_US(1) + CTX_MS(n) + CTX_S(2u) + CTX_MS(0.5) + CTX_S(3LL) + CTX_NS(4UL);
    ctx_poll_t poll = ctx_poll_every(ctx, 1);
    CTX_SCOPED ctx_t *a = ctx_with_timeout(ctx, spans);
    CTX_SCOPED ctx_t *b = ctx_with_value(a, &key, &n);
    CTX_SCOPED ctx_t *c = ctx_with_deadline(b, ctx_time_add(ctx_now(), CTX_FOREVER));
    CTX_SCOPED ctx_t *d = ctx_merge(c, b);
    CTX_SCOPED ctx_t *e = ctx_without_cancel(d);
    CTX_SCOPED ctx_t *f = ctx_with_cancel(e);
    CTX_SCOPED ctx_t *g = ctx_notify_signals(f, &number, 1);
    CTX_SCOPED ctx_t *h = ctx_with_request(g, request_from(f));
    CTX_SCOPED ctx_t *i = ctx_derive(h, &desc);
    ctx_leaf_init(&leaf, i, CTX_NO_DEADLINE);
    if (ctx_poll(&poll) || !ctx_leaf_cancel(&leaf)) return CTX_INVALID;
    return ctx_leaf_err(&leaf) == CTX_CANCELED ? ctx_err(h) : CTX_NOT_READY;
}
END

macros_bring_no_warning_in_c() {
    for flags in "" -DCTXCANCEL_NO_SITES; do
        cc $flags -Wcast-qual -Wredundant-decls -Wmissing-prototypes -Wfloat-equal -c "$tmp/macros.c" -o "$tmp/macros.o"
    done
    case $($CC --version) in *clang*) cc -Wmissing-variable-declarations -c "$tmp/macros.c" -o "$tmp/macros.o" ;; esac
}

macros_bring_no_warning_in_cpp() {
    cp "$tmp/macros.c" "$tmp/macros.cpp"
    careful=-Wold-style-cast
    case $($CXX --version) in
        *clang*) careful="$careful -Wmissing-variable-declarations -Wmissing-prototypes" ;;
        *) careful="$careful -Wuseless-cast" ;;
    esac
    for flags in "" -DCTXCANCEL_NO_SITES; do
        cxx $flags $careful -Wcast-qual -Wredundant-decls -Wextra-semi -Wfloat-equal -c "$tmp/macros.cpp" -o "$tmp/macros.o"
    done
    # So does the implementation, which is C throughout.
    cp "$tmp/impl.c" "$tmp/impl.cpp"
    cxx $careful -c "$tmp/impl.cpp" -o "$tmp/impl_cpp.o"
}

# A statement that drops what was made or refused is told at compile time; one whose result tells nothing new is not.
ignored_results_are_told() {
    for call in 'ctx_with_cancel(ctx)' 'ctx_derive(ctx, NULL)' 'ctx_with_request(ctx, NULL)' 'ctx_pool_new(ctx, NULL)' \
        'ctx_group_new(ctx, NULL)' 'ctx_chan_new(1, 1)' 'ctx_pool_submit(pool, ctx, "work", work, NULL)' \
        'ctx_go(ctx, "work", work, NULL)' 'ctx_group_try_go(group, work, NULL)' 'ctx_batch_add(batch, "item")'; do
        ignores "$call" >"$tmp/ignores.c"
        refuse $CC -Werror=unused-result -I. -c "$tmp/ignores.c" -o "$tmp/ignores.o"
    done
    for call in 'ctx_group_go(group, work, NULL)' 'ctx_cancel(ctx)' 'ctx_sleep(ctx, 1)' 'ctx_retain(ctx)' \
        'ctx_pool_drain(pool, 0, NULL)' 'ctx_group_wait(group)' 'ctx_pool_free(NULL)' 'ctx_end(NULL)' \
        'ctx_batch_drain(batch, 0, NULL)'; do
        ignores "$call" >"$tmp/ignores.c"
        $CC -Wall -Wextra -Werror -I. -c "$tmp/ignores.c" -o "$tmp/ignores.o"
    done
}

ignores() { # STATEMENT
    cat <<END
#include "$tmp/request.h"
int work(ctx_t *ctx, void *arg);
void ignores(ctx_t *ctx, ctx_pool_t *pool, ctx_group_t *group, ctx_batch_t *batch);
void ignores(ctx_t *ctx, ctx_pool_t *pool, ctx_group_t *group, ctx_batch_t *batch) {
    (void)ctx, (void)pool, (void)group, (void)batch;
    $1;
}
END
}

null_that_is_a_program_error_is_told() {
    for call in 'ctx_deadline(NULL)' 'ctx_value(NULL, NULL)' 'ctx_sem_release(NULL, 1)' 'ctx_limiter_allow(NULL, 1)'; do
        ignores "$call" >"$tmp/null.c"
        refuse $CC -Werror=nonnull -I. -c "$tmp/null.c" -o "$tmp/null.o"
    done
}

# In a file that includes the declarations first, and so has them with their attributes, the implementation still
# asserts: the compiler must not take these checks out.
file nulls.c <<'END'
#include "ctxcancel.h"
#include <setjmp.h>
#include <stdlib.h>
static jmp_buf tripped;
static void assertion_failed(void) { longjmp(tripped, 1); }
#undef CTXCANCEL_ASSERT
#define CTXCANCEL_ASSERT(x) ((x) ? (void)0 : assertion_failed())
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
static void *volatile null;
static volatile int missed, value;
#define TRIPS(call)                                   \
    do {                                              \
        if (!setjmp(tripped)) {                       \
            value = (call) != 0;                      \
            missed++, printf("passed: %s\n", #call);  \
        }                                             \
    } while (0)
#define NO(type) ((type *)null)
static void fn(void *arg) { (void)arg; }
int main(void) {
    static ctx_on_done_t reg;
    TRIPS(ctx_deadline(NO(ctx_t)));
    TRIPS(ctx_name(NO(ctx_t)));
    TRIPS(ctx_site(NO(ctx_t)));
    TRIPS(ctx_sampled(NO(ctx_t)));
    TRIPS(ctx_on_done(&reg, NO(ctx_t), fn, NULL));
    TRIPS(ctx_on_done_stop(NO(ctx_on_done_t)));
    TRIPS(ctx_value(NO(ctx_t), NULL));
    TRIPS(ctx_poll_every(NO(ctx_t), 1).left);
    TRIPS(ctx_flag(NO(ctx_t)));
    TRIPS(ctx_done_fd(NO(ctx_t)));
    TRIPS(ctx_sem_init(NO(ctx_sem_t), 1));
    TRIPS(ctx_sem_acquire(NO(ctx_sem_t), ctx_background(), 1));
    TRIPS(ctx_sem_try_acquire(NO(ctx_sem_t), 1));
    TRIPS((ctx_sem_release(NO(ctx_sem_t), 1), 1));
    TRIPS(ctx_group_ctx(NO(ctx_group_t)));
    TRIPS(ctx_chan_len(NO(ctx_chan_t)));
    TRIPS(ctx_limiter_init(NO(ctx_limiter_t), 1, 1));
    TRIPS(ctx_limiter_allow(NO(ctx_limiter_t), 1));
    TRIPS(ctx_limiter_reserve(NO(ctx_limiter_t), 1));
    TRIPS((ctx_limiter_refund(NO(ctx_limiter_t), 1), 1));
    TRIPS(ctx_limiter_wait(NO(ctx_limiter_t), ctx_background(), 1));
    return missed;
}
END

declared_nonnull_takes_no_check_out() {
    cc -O2 -D_GNU_SOURCE "$tmp/nulls.c" -o "$tmp/prog"
    timeout 20 "$tmp/prog"
}

spans_are_constants_of_one_type_in_cpp() {
    file spans.cpp <<'END'
#include "ctxcancel.h"
static_assert(CTX_MS(2) == 2000000 && CTX_S(0.25) == CTX_MS(250) && CTX_US(3u) == CTX_NS(3000ll), "");
static_assert(sizeof CTX_MS(1) == sizeof(ctx_dur_t), "");
enum { ms = CTX_MS(1) };
int spans(ctx_dur_t dur);
int spans(ctx_dur_t dur) {
    switch (dur) {
        case CTX_MS(1): return ms;
        default: return 0;
    }
}
END
    cxx -Wold-style-cast -c "$tmp/spans.cpp" -o "$tmp/spans.o"
}

allocator_can_be_chosen() {
    file own.c <<'END'
#include <stdlib.h>
static long own_live, own_made;
static void *own_malloc(size_t n) { __atomic_add_fetch(&own_live, 1, 5); __atomic_add_fetch(&own_made, 1, 5); return malloc(n); }
__attribute__((unused)) static void *own_realloc(void *p, size_t n) { if (!p) return own_malloc(n); return realloc(p, n); }
static void own_free(void *p) { if (p) __atomic_sub_fetch(&own_live, 1, 5); free(p); }
#define CTXCANCEL_MALLOC own_malloc
#define CTXCANCEL_REALLOC own_realloc
#define CTXCANCEL_FREE own_free
#define CTXCANCEL_IMPLEMENTATION
#include "ctxcancel.h"
static int nothing(ctx_t *ctx, void *arg) { (void)arg; return ctx_err(ctx); }
int main(void) {
    ctx_t *ctx = ctx_with_timeout(ctx_background(), CTX_S(100));
    ctx_pool_t *pool = ctx_pool_new(ctx, NULL);
    int rc = pool ? ctx_pool_submit(pool, ctx, "nothing", nothing, NULL) : -1;
    ctx_pool_drain(pool, CTX_S(10), NULL);
    ctx_pool_free(pool);
    ctx_end(ctx);
    ctx_runtime_stop();
    return rc == 0 && own_made > 0 && own_live == 0 ? 0 : 1;
}
END
    cc -D_GNU_SOURCE "$tmp/own.c" -o "$tmp/prog"
    timeout 20 "$tmp/prog"
}

# At -O2 they are cells of tests/check.sh.
every_configuration_compiles() {
    for flags in -DCTXCANCEL_NO_FUTEX -DCTXCANCEL_NO_SITES -DNDEBUG "-DCTXCANCEL_ASSERT(x)=((void)(x))" \
        "-DCTXCANCEL_STATIC -DCTXCANCEL_NO_FUTEX"; do
        cc $flags -O1 -c "$tmp/impl.c" -o "$tmp/impl.o"
    done
}

sites_can_be_left_out() {
    cc -DCTXCANCEL_NO_SITES -c "$tmp/main.c" -o "$tmp/main.o"
    refuse grep -a 'main\.c:[0-9]' "$tmp/main.o"
    cc -c "$tmp/main.c" -o "$tmp/main.o"
    grep -a 'main\.c:[0-9]' "$tmp/main.o"
}

# The first C block of README.md is a whole program.
readme_program_works() {
    sed -n '/^```c$/,/^```$/p' README.md | sed '1d; /^```$/,$d' >"$tmp/readme.c"
    $CC -I. "$tmp/readme.c" -pthread -o "$tmp/prog"
    timeout 20 "$tmp/prog" >"$tmp/printed"
    [ "$(tail -n 1 "$tmp/printed")" = "deadline exceeded" ]
}

# -- installing ----------------------------------------------------------------------------------------------------

install_puts_the_header_where_it_is_told() {
    make --no-print-directory install PREFIX="$tmp/usr"
    cmp ctxcancel.h "$tmp/usr/include/ctxcancel.h"
    make --no-print-directory install PREFIX=/opt/ctx DESTDIR="$tmp/stage"
    cmp ctxcancel.h "$tmp/stage/opt/ctx/include/ctxcancel.h"
    grep -q '^prefix=/opt/ctx$' "$tmp/stage/opt/ctx/share/pkgconfig/ctxcancel.pc"
}

pkg_config_finds_the_installed_header() {
    make --no-print-directory install PREFIX="$tmp/usr"
    flags=$(PKG_CONFIG_PATH="$tmp/usr/share/pkgconfig" pkg-config --cflags --libs ctxcancel)
    (cd "$tmp" && $CC -std=c11 impl.c main.c $flags -o prog)
    "$tmp/prog"
}

# Every ctx_ function that the preprocessed declarations name, but for the private ones.
every_public_function_has_a_man_page() {
    make --no-print-directory install PREFIX="$tmp/usr"
    man=$tmp/usr/share/man
    $CC -I. -E "$tmp/decl.c" | awk '/^# [0-9]+ "/ { ours = ($3 ~ /ctxcancel\.h"$/); next } ours' |
        grep -oE '\bctx_[a-z_]+ *\(' | tr -d ' (' | sort -u | grep -v '^ctx__' >"$tmp/functions"
    [ "$(wc -l <"$tmp/functions")" -gt 80 ]
    for name in $(cat "$tmp/functions") ctx_derive CTX_VALUE CTX_SCOPED; do
        [ -s "$man/man3/$name.3" ] || [ -s "$man/man3/${name%_at}.3" ] || { echo "no page: $name"; return 1; }
    done
    for link in $(sed -n 's/^\.so //p' "$man"/man3/*.3); do [ -s "$man/$link" ]; done
    grep -F 'ctx_pool_submit_wait \- like ctx_pool_submit()' "$man/man3/ctx_pool_submit_wait.3"
    grep -F 'ctx_t *ctx_derive(ctx_t *parent, const ctx_desc_t *desc);' "$man/man3/ctx_derive.3"
    grep -F 'bool ctx_cancel(ctx_t *ctx);' "$man/man3/ctx_cancel.3"
    refuse ls "$man"/man3/*_at.3
    grep -F 'ctx_dur_t task_timeout;' "$man/man3/ctx_pool_new.3"
    grep -F 'Rules that hold throughout' "$man/man7/ctxcancel.7"
}

man_pages_are_well_formed() {
    make --no-print-directory install PREFIX="$tmp/usr"
    mandoc -T lint -W warning $(grep -L '^\.so ' "$tmp"/usr/share/man/man3/*) "$tmp/usr/share/man/man7/ctxcancel.7"
}

uninstall_leaves_no_file() {
    make --no-print-directory install PREFIX=/opt/ctx DESTDIR="$tmp/gone" LIBS="-pthread -latomic"
    grep -q '^Libs: -pthread -latomic$' "$tmp/gone/opt/ctx/share/pkgconfig/ctxcancel.pc"
    grep -q '"Threads::Threads;-latomic"' "$tmp/gone/opt/ctx/share/cmake/ctxcancel/ctxcancelConfig.cmake"
    echo kept >"$tmp/gone/opt/ctx/share/man/man3/ctx_other.3"
    make --no-print-directory uninstall PREFIX=/opt/ctx DESTDIR="$tmp/gone"
    [ "$(find "$tmp/gone" -type f)" = "$tmp/gone/opt/ctx/share/man/man3/ctx_other.3" ]
}

# A tree that was moved after its installation; one program with its own implementation, one that links it, one in C++.
cmake_finds_the_installed_header() {
    make --no-print-directory install PREFIX="$tmp/before"
    mv "$tmp/before" "$tmp/after"
    mkdir "$tmp/cmake"
    cat "$tmp/impl.c" "$tmp/main.c" >"$tmp/cmake/whole.c"
    cp "$tmp/main.c" "$tmp/cmake/linked.c"
    cp "$tmp/main.c" "$tmp/cmake/linked.cpp"
    file cmake/CMakeLists.txt <<'END'
cmake_minimum_required(VERSION 3.11)
project(user ${LANGUAGE})
if(LANGUAGE STREQUAL C)
  find_package(ctxcancel 9 QUIET)
  if(ctxcancel_FOUND)
    message(FATAL_ERROR "a version that is not installed was found")
  endif()
  add_executable(whole whole.c)
  add_executable(linked linked.c)
else()
  add_executable(linked linked.cpp)
endif()
find_package(ctxcancel 0.1 REQUIRED)
target_link_libraries(linked ctxcancel::implementation)
if(LANGUAGE STREQUAL C)
  target_link_libraries(whole ctxcancel::ctxcancel)
endif()
END
    for language in C $cmake_cxx; do
        cmake -S "$tmp/cmake" -B "$tmp/cmake/$language" -DLANGUAGE=$language -DCMAKE_PREFIX_PATH="$tmp/after" \
            -DCMAKE_C_COMPILER="$CC" -DCMAKE_CXX_COMPILER="$CXX"
        cmake --build "$tmp/cmake/$language"
        "$tmp/cmake/$language/linked"
    done
    "$tmp/cmake/C/whole"
}

for test in declarations_need_no_stb_ds program_that_instantiates_stb_ds_elsewhere_links program_may_use_our_stb_ds \
    file_that_implements_stb_ds_above_us_builds file_that_only_declares_stb_ds_above_us_builds \
    file_that_implements_stb_ds_below_us_builds one_implementation_serves_many_files \
    file_may_include_declarations_and_then_the_implementation two_static_copies_live_in_one_program \
    static_copy_lives_beside_the_shared_one value_in_a_shared_header_is_one_key \
    late_include_in_strict_c_works_or_says_what_to_do asking_for_posix_alone_builds \
    plugin_shares_a_key_despite_hidden_visibility ignored_results_are_told null_that_is_a_program_error_is_told \
    declared_nonnull_takes_no_check_out macros_bring_no_warning_in_c declarations_compile_after_any_header_in_strict_c \
    linkage_can_be_chosen allocator_can_be_chosen every_configuration_compiles sites_can_be_left_out \
    readme_program_works \
    install_puts_the_header_where_it_is_told every_public_function_has_a_man_page uninstall_leaves_no_file; do
    expect $test
done
for test in c_and_cpp_files_link_and_share_a_key implementation_compiled_as_cpp_serves_c \
    macros_bring_no_warning_in_cpp spans_are_constants_of_one_type_in_cpp; do
    if has "$CXX"; then expect $test; else skip $test "no $CXX"; fi
done
if has pkg-config; then expect pkg_config_finds_the_installed_header
else skip pkg_config_finds_the_installed_header "no pkg-config"; fi
if has mandoc; then expect man_pages_are_well_formed; else skip man_pages_are_well_formed "no mandoc"; fi
cmake_cxx=
if has "$CXX"; then cmake_cxx=CXX; fi
if has cmake; then expect cmake_finds_the_installed_header; else skip cmake_finds_the_installed_header "no cmake"; fi
finish

#!/bin/sh
# What holds for the text of ctxcancel.h and for the names that it gives to a program.
. tests/shell.sh

header=ctxcancel.h
printf '#define CTXCANCEL_IMPLEMENTATION\n#include "ctxcancel.h"\n' >"$tmp/impl.c"
printf '#include "ctxcancel.h"\n' >"$tmp/decl.c"

# -- sections ------------------------------------------------------------------------------------------------------

# The banners of a part of the header, "3. context" a line.
banners() { sed -n 's|^/\* == \([0-9]*\. [a-z]*\) =*\( \*/\)*$|\1|p'; }
declarations() { sed '/^#endif \/\* CTXCANCEL_H \*\//q' $header; }
implementation() { sed '1,/^#endif \/\* CTXCANCEL_H \*\//d' $header; }
index_of() { sed '/\*\//q' $header | grep -o '== [0-9]*\. [a-z]*' | sed 's/^== //'; }

sections_agree() {
    declarations | banners >"$tmp/declared"
    implementation | banners >"$tmp/implemented"
    index_of >"$tmp/index"
    [ "$(wc -l <"$tmp/index")" -ge 10 ]
    diff "$tmp/index" "$tmp/declared"
    diff "$tmp/index" "$tmp/implemented"
}

sections_are_in_order() {
    index_of | sort -n -c
    [ -z "$(index_of | sort -n | uniq -d)" ]
}

# In the implementation the paragraph of a section goes on in the banner's comment.
banners_have_one_form() {
    grep -E '^/\* ?==' $header | sed 's| \*/$||' >"$tmp/banners"
    refuse grep -vE '^/\* == [0-9]+\. [a-z]+ =+$' "$tmp/banners"
    [ "$(awk '{ print length($0) }' "$tmp/banners" | sort -u | wc -l)" = 1 ]
}

every_section_explains_itself() {
    implementation | awk '
        /^\/\* == / { if (banner) { print "no paragraph: " banner; bad = 1 } banner = $0; words = 0; next }
        banner && !words && /^$/ { next }
        banner && !words && !/^\/\* / { print "no paragraph: " banner; bad = 1; banner = ""; next }
        banner { words += NF; if (/\*\/$/) { if (words < 20) { print "hardly a paragraph: " banner; bad = 1 } banner = "" } }
        END { exit bad }'
}

# -- text ----------------------------------------------------------------------------------------------------------

no_line_is_longer_than_120() {
    awk 'length($0) > 120 { print FILENAME ":" FNR ": " length($0); bad = 1 } END { exit bad }' \
        $header $(find tests bench docs -name '*.[ch]')
}

text_is_plain() {
    refuse grep -nP '\t|[ \t]+$|\r' $header
    refuse grep -nP '[^\x00-\x7F]' $header
}

# The version stands in the header twice, and in the Makefile, which gives it to pkg-config and to CMake.
version_is_one() {
    version=$(sed -n 's/^VERSION = //p' Makefile)
    echo "$version" | grep -E '^[0-9]+\.[0-9]+\.[0-9]+$'
    grep -F "#define CTXCANCEL_VERSION_STRING \"$version\"" $header
    grep "^#define CTXCANCEL_VERSION $(echo "$version" | awk -F. '{ print $1 * 10000 + $2 * 100 + $3 }') " $header
}

# -- names ---------------------------------------------------------------------------------------------------------

# Macros that the header itself leaves defined, from `cc -dD -E`, where a line marker says whose line it is.
macros_of() {
    $CC -std=c11 -D_GNU_SOURCE -I. -dD -E "$1" | awk '
        /^# [0-9]+ "/ { ours = ($3 ~ /ctxcancel\.h"$/); next }
        ours && $1 == "#define" { name = $2; sub(/\(.*/, "", name); left[name] = 1 }
        $1 == "#undef" { delete left[$2] }
        END { for (name in left) print name }' | sort
}

# Lower-case macros stand for functions: the derivers.
macros_start_with_ctx() {
    macros_of "$tmp/decl.c" >"$tmp/decl.macros"
    [ "$(wc -l <"$tmp/decl.macros")" -gt 10 ]
    refuse grep -vE '^(CTX_|CTXCANCEL_|ctx_|STBDS_(REALLOC|FREE)$)' "$tmp/decl.macros"
    macros_of "$tmp/impl.c" >"$tmp/impl.macros"
    refuse grep -vE '^(CTX_|CTXCANCEL_|ctx_|STBDS_(REALLOC|FREE)$)' "$tmp/impl.macros"
}

functions_start_with_ctx() {
    $CC -std=c11 -I. -c "$tmp/decl.c" -o "$tmp/decl.o" -aux-info "$tmp/prototypes"
    grep 'ctxcancel\.h:' "$tmp/prototypes" | sed 's/ (.*//; s/.*[ *]//' | sort -u >"$tmp/functions"
    [ "$(wc -l <"$tmp/functions")" -gt 30 ]
    refuse grep -vE '^ctx_' "$tmp/functions"
}

symbols_start_with_ctx() {
    $CC -std=c11 -I. -c "$tmp/impl.c" -o "$tmp/impl.o"
    nm -g --defined-only "$tmp/impl.o" | awk '{ print $NF }' >"$tmp/symbols"
    grep '^ctx_cancel$' "$tmp/symbols"
    refuse grep -vE '^(ctx_|stbds_)' "$tmp/symbols"
}

# But for the one symbol at which the copies of the library in a process agree who handles signals.
static_implementation_exports_nothing() {
    $CC -std=c11 -I. -DCTXCANCEL_STATIC -c "$tmp/impl.c" -o "$tmp/static.o"
    nm -g --defined-only "$tmp/static.o" | awk '{ print $NF }' >"$tmp/symbols"
    refuse grep -E '^ctx_' <<EOT
$(grep -v '^ctx__signals_owner$' "$tmp/symbols")
EOT
}

declarations_emit_nothing() {
    $CC -std=c11 -I. -O0 -c "$tmp/decl.c" -o "$tmp/decl.o"
    [ -z "$(nm -g "$tmp/decl.o")" ]
}

public_part_includes_only_c_and_pthread() {
    declarations | sed -n 's/^#include <\(.*\)>.*/\1/p' | sort >"$tmp/includes"
    refuse grep -vE '^(assert|errno|stdbool|stddef|stdint|stdio|pthread|limits|string|stdlib)\.h$' "$tmp/includes"
}

for test in sections_agree sections_are_in_order banners_have_one_form every_section_explains_itself \
    no_line_is_longer_than_120 text_is_plain version_is_one macros_start_with_ctx functions_start_with_ctx \
    symbols_start_with_ctx static_implementation_exports_nothing declarations_emit_nothing \
    public_part_includes_only_c_and_pthread; do
    expect $test
done
finish

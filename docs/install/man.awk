# Man pages from the text of ctxcancel.h: awk -v out=DIR -v version=0.1.0 -v date=2026-01-31 -f man.awk ctxcancel.h
#
# Each comment with the declarations right below it is a page of section 3, which has the name of the first declaration;
# the others are links to it. The comment at the top of the header is ctxcancel(7). Runs in any POSIX awk.

# -- reading the header --------------------------------------------------------------------------------------------

NR == 1, /\*\/$/ { if (!top_read) top = top clean_comment($0) "\n"; if (/\*\/$/) top_read = 1; next }
/^#endif \/\* CTXCANCEL_H \*\// { finish_block(); exit }
/^\/\* == [0-9]+\. [a-z]+ =/ { finish_block(); section = $3 " " $4; sections[++n_sections] = section; next }

in_comment || (/^\/\* / && !in_struct && !in_body) {
    if (!in_comment) { finish_block(); comment = "" }
    comment = comment clean_comment($0) "\n"
    in_comment = !/\*\/$/
    next
}
in_body { if (/^[}]/) in_body = 0; next }
in_macro { in_macro = /\\$/; next }
in_struct { body = body $0 "\n"; if (/^[}]/) { in_struct = 0; add_type() } next }
/^typedef (struct|enum)[^;]*[{]$/ { in_struct = 1; kind = $2; body = ""; next }
/^typedef .*\(\*ctx_[a-z_]+\)\(.*\);$/ {
    name = $0
    sub(/^.*\(\*/, "", name)
    sub(/\).*/, "", name)
    add(name, $0)
    next
}
/^#define (ctx_[a-z_]+|CTX_[A-Z]+)(\(| )/ {
    in_macro = /\\$/
    name = $2
    sub(/\(.*/, "", name)
    if (name ~ /^ctx_/) macro[name] = 1
    else if (comment != "" && name == "CTX_SCOPED") add(name, name)
    else if (comment != "" && $2 ~ /\(/) { sub(/\).*/, ")"); sub(/^#define /, ""); add(name, $0) }
    next
}
prototype != "" { prototype = prototype " " trim($0); if (/;$/ || /[{]/) add_function(); next }
/^(CTXCANCEL_API|CTX__[A-Z_]+|static inline) .*ctx_/ { prototype = trim($0); if (/;$/ || /[{]/) add_function(); next }
/^$/ { finish_block() }

function trim(s) { sub(/^[ \t]+/, "", s); sub(/[ \t]+$/, "", s); return s }

function clean_comment(s) { sub(/^\/\* ?/, "", s); sub(/ *\*\/$/, "", s); sub(/^   /, "", s); return s }

function add_function(   text, name) {
    text = prototype
    prototype = ""
    if (text ~ /[{]/ && text !~ /[}]$/) in_body = 1
    sub(/ *[{].*/, ";", text)
    gsub(/(CTXCANCEL_API|static inline|CTX__[A-Z_]+(\([0-9, ]*\))?) */, "", text)
    sub(/ +;$/, ";", text)
    name = text
    sub(/\(.*/, "", name)
    sub(/^.*[ *]/, "", name)
    if (name ~ /^ctx__/) return
    if (name ~ /_at$/ && macro[substr(name, 1, length(name) - 3)]) { # as the macro is called: without the site
        sub(/, const char \*site\);$/, ");", text)
        sub(/_at\(/, "(", text)
        name = substr(name, 1, length(name) - 3)
    }
    add(name, text)
}

# One more name of the page that is being read.
function add(name, text) {
    if (names != "" && index(" " names " ", " " name " ")) return
    names = names (names == "" ? "" : " ") name
    synopsis = synopsis (synopsis == "" ? "" : "\n") text
}

# The fields or values of a type, which are "declaration \2 comment" each, or nothing if they are private.
function add_type(   name, rest, i, remark, item, n, list, stop) {
    name = body
    sub(/^.*\n[}]/, "", name)
    gsub(/[ ;\n]/, "", name)
    if (name !~ /^ctx_[a-z]/) return
    rest = body
    sub(/\n[}].*$/, "\n", rest)
    stop = kind == "enum" ? "," : ";"
    while ((rest = trim_all(rest)) != "") {
        if (substr(rest, 1, 2) == "/*") {
            i = index(rest, "*/")
            item[n] = item[n] (item[n] ~ /\2/ ? " " : "\2") squeeze(substr(rest, 3, i - 3))
            rest = substr(rest, i + 2)
            continue
        }
        i = index(rest, stop)
        remark = index(rest, "/*")
        if (remark && (!i || remark < i)) i = remark - 1 # the last value of an enum has no comma
        if (!i) i = length(rest)
        item[++n] = squeeze(substr(rest, 1, i))
        sub(/,$/, "", item[n])
        rest = substr(rest, i + 1)
    }
    if (comment !~ /private/) for (i = 1; i <= n; i++) list = list item[i] "\3"
    if (list != "") { fields[name] = list; kinds[name] = kind }
    add(name, "typedef " kind (list == "" ? " " : " { ... } ") name ";")
}

function trim_all(s) { sub(/^[ \t\n]+/, "", s); return s }
function squeeze(s) { gsub(/[ \t\n]+/, " ", s); return trim(s) }

# A page is whole: comment, names, synopsis.
function finish_block() {
    if (names != "") {
        drop_sites()
        n_pages++
        page_names[n_pages] = names
        page_text[n_pages] = after_previous(comment)
        page_synopsis[n_pages] = synopsis
        page_section[n_pages] = section
        in_section[section] = in_section[section] (in_section[section] == "" ? "" : " ") names
        if (names ~ /^ctx_[a-z_]*/ && synopsis !~ /^typedef/) { previous = names; sub(/ .*/, "", previous) }
    }
    if (names != "" || $0 !~ /^$/) comment = ""
    names = synopsis = ""
}

# Nobody calls the functions that take the site of a call when macros of the page do: ctx_cancel_at().
function drop_sites(   name, line, n, i, kept, lines) {
    n = split(names, name, " ")
    split(synopsis, line, "\n")
    for (i = 1; i <= n; i++) {
        if (name[i] ~ /_at$/ && macro[substr(name[i], 1, length(name[i]) - 3)]) continue
        kept = kept (kept == "" ? "" : " ") name[i]
        lines = lines (lines == "" ? "" : "\n") line[i]
    }
    names = kept
    synopsis = lines
}

# "The same, but ..." stands alone on its page.
function after_previous(s,   like) {
    like = previous "()"
    if (names ~ /_try_/) { like = names; gsub(/_try/, "", like); gsub(/ /, "() and ", like); like = like "()" }
    sub(/^The same, but waits/, "Like " like ", but it waits", s)
    sub(/^(The same|As above)/, "Like " like, s)
    return s
}

# -- writing pages -------------------------------------------------------------------------------------------------

END {
    for (p = 1; p <= n_pages; p++) write_page(p)
    write_overview()
}

function escape(s) { gsub(/\\/, "\\e", s); gsub(/-/, "\\-", s); return s }

# A dot at the beginning of a line would be a request.
function plain(s) { return s ~ /^[.']/ ? "\\&" s : s }

# `code` is bold, and a function of the library refers to its page.
function inline_text(s,   done, name, i) {
    s = escape(s)
    while (match(s, /`[^`]*`/)) {
        name = substr(s, RSTART, RLENGTH)
        i = RSTART
        done = done refer(substr(s, 1, i - 1)) "\\fB" substr(name, 2, length(name) - 2) "\\fR"
        s = substr(s, i + length(name))
    }
    return plain(done refer(s))
}

function refer(s,   done) {
    while (match(s, /ctx_[a-z_]+\(\)/)) {
        done = done substr(s, 1, RSTART - 1) "\\fB" substr(s, RSTART, RLENGTH - 2) "\\fR(3)"
        s = substr(s, RSTART + RLENGTH)
    }
    return done s
}

function header(file, name, number) {
    print ".\\\" Made from ctxcancel.h by its `make install`." >file
    printf ".TH %s %s \"%s\" \"ctxcancel %s\" \"ctxcancel\"\n.ad l\n.nh\n", name, number, date, version >file
}

# The first sentence of a comment, without its end.
function summary(text, name,   s) {
    s = text
    gsub(/\n/, " ", s)
    gsub(/`/, "", s)
    s = trim(s)
    if (s == "") return name ~ /_desc_t$/ ? "fields of a description" : "a type of ctxcancel.h"
    sub(/^(For|In) [^:.]*: /, "", s)
    if (match(s, /[.:;]( |$)/)) s = substr(s, 1, RSTART - 1)
    if (s ~ /^[A-Z]([a-z]| )/) s = tolower(substr(s, 1, 1)) substr(s, 2)
    return escape(s)
}

function write_page(p,   n, name, file, i, all) {
    n = split(page_names[p], name, " ")
    file = out "/" name[1] ".3"
    header(file, name[1], 3)
    for (i = 1; i <= n; i++) all = all (i > 1 ? ", " : "") name[i]
    print ".SH NAME\n" all " \\- " summary(page_text[p], name[1]) >file
    print ".SH SYNOPSIS\n.nf\n.B #include <ctxcancel.h>\n.PP" >file
    write_synopsis(file, page_synopsis[p])
    print ".fi" >file
    if (page_text[p] != "") { print ".SH DESCRIPTION" >file; write_text(file, page_text[p]) }
    write_types(file, p, page_text[p] == "")
    print ".SH SEE ALSO" >file
    write_list(file, page_section[p], " " page_names[p] " ", ",")
    print ".BR ctxcancel (7)" >file
    close(file)
    for (i = 2; i <= n; i++) {
        print ".so man3/" name[1] ".3" >(out "/" name[i] ".3")
        close(out "/" name[i] ".3")
    }
}

# Lines of at most 78 columns, broken after a comma.
function write_synopsis(file, text,   line, n, i, s, cut) {
    n = split(text, line, "\n")
    for (i = 1; i <= n; i++) {
        s = line[i]
        while (length(s) > 78) {
            for (cut = 78; cut > 8 && substr(s, cut, 2) != ", "; cut--) continue
            if (cut <= 8) break
            print "\\fB" escape(substr(s, 1, cut)) "\\fR" >file
            s = "        " substr(s, cut + 2)
        }
        print "\\fB" escape(s) "\\fR" >file
    }
}

# Paragraphs, bullets, and lines that are indented further: examples.
function write_text(file, text,   line, n, i, s, list, example, gap) {
    n = split(text, line, "\n")
    while (n && line[n] == "") n--
    gap = 0
    for (i = 1; i <= n; i++) {
        s = line[i]
        if (s == "") { gap = 1; continue }
        if (s ~ /^    / && !list) {
            if (!example) print ".PP\n.nf\n.RS 4" >file
            else if (gap) print "" >file
            example = 1
            sub(/^    /, "", s)
            print plain(escape(s)) >file
        } else {
            if (example) print ".RE\n.fi" >file
            if (s ~ /^ *- /) { sub(/^ *- /, "", s); print ".IP \\(bu 2" >file; list = 1 }
            else if (s !~ /^ / && i > 1 && (gap || example || list || ends_paragraph(line[i - 1], s))) {
                print ".PP" >file
                list = 0
            }
            example = 0
            print inline_text(trim(s)) >file
        }
        gap = 0
    }
    if (example) print ".RE\n.fi" >file
}

# A line that ends with a sentence where the next word had room.
function ends_paragraph(line, next_line) {
    sub(/ .*/, "", next_line)
    return line ~ /\.$/ && next_line ~ /^[A-Z0-9`]/ && length(line) + length(next_line) < 110
}

# The fields of the structs, and the values of the enums, that a synopsis names.
function write_types(file, p, alone,   word, n, i, text, seen) {
    text = page_synopsis[p]
    gsub(/[^a-z_0-9]+/, " ", text)
    n = split(text, word, " ")
    if (alone) for (i = 1; i <= n; i++) if (word[i] in fields) { print ".SH DESCRIPTION" >file; break }
    for (i = 1; i <= n; i++)
        if ((word[i] in fields) && !(word[i] in seen)) { seen[word[i]] = 1; write_type(file, word[i], seen) }
}

function write_type(file, type, seen,   item, n, i, part, word, m, j, inner) {
    print (".SS " (kinds[type] == "enum" ? "Values of " : "Fields of ") type) >file
    n = split(fields[type], item, "\3") - 1
    for (i = 1; i <= n; i++) {
        part[2] = ""
        split(item[i], part, "\2")
        print ".TP\n\\fB" escape(part[1]) "\\fR" >file
        print (part[2] == "" ? "\\&" : inline_text(part[2])) >file
        sub(/[^a-z_0-9].*/, "", part[1])
        if (kinds[part[1]] == "enum" && !(part[1] in seen)) { seen[part[1]] = 1; inner[++m] = part[1] }
    }
    for (j = 1; j <= m; j++) write_type(file, inner[j], seen)
}

# References to the functions of a section, or with no end to all its pages.
function write_list(file, part, without, end,   name, n, i, last) {
    n = split(in_section[part], name, " ")
    for (i = 1; i <= n; i++) {
        if (index(without, " " name[i] " ") || (end != "" && name[i] ~ /_(t|fn)$/)) continue
        if (last) print ".BR " last " (3)," >file
        last = name[i]
    }
    if (last) print ".BR " last " (3)" end >file
}

# The comment at the top of the header: headings stand over indented lines, tables have two columns.
function write_overview(   file, line, n, i, s, text) {
    file = out "/../man7/ctxcancel.7"
    header(file, "ctxcancel", 7)
    n = split(top, line, "\n")
    s = line[1]
    sub(/^ctxcancel.h: /, "", s)
    sub(/\.$/, "", s)
    print ".SH NAME\nctxcancel \\- " escape(s) >file
    print ".SH SYNOPSIS\n.B #include <ctxcancel.h>\n.SH DESCRIPTION" >file
    for (i = 3; i <= n; i++) {
        if (line[i] ~ /^Sections,/) break
        if (line[i] ~ /^[A-Z][^.:]*$/ && line[i + 1] ~ /^  [^ ]/) {
            write_text(file, text)
            text = ""
            print ".SS " escape(line[i]) >file
        } else if (line[i] ~ /^  [A-Z_a-z\/()]+  +[^ ]/) {
            s = trim(line[i])
            print ".TP\n\\fB" escape(substr(s, 1, index(s, " ") - 1)) "\\fR" >file
            sub(/^[^ ]+ +/, "", s)
            print inline_text(s) >file
        } else text = text line[i] "\n"
    }
    write_text(file, text)
    print ".SH SEE ALSO" >file
    for (i = 1; i <= n_sections; i++) {
        if (in_section[sections[i]] == "") continue
        print ".SS " sections[i] >file
        write_list(file, sections[i], "", "")
    }
    close(file)
}

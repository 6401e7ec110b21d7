# Turn samples into a table. First file: figures.txt. Second: `who<TAB>figure<TAB>value<TAB>unit`, one line a sample.
# -v short=1: only figures with a target, fewer columns, for the README. -v only=TEXT: only figures that contain TEXT.

BEGIN {
    FS = "\t"
    word["go"] = "Go"; word["tokio"] = "tokio"; word["cpp"] = "C++"; word["nsync"] = "nsync"; word["glib"] = "GLib"; word["posix"] = "POSIX"
    others = split("tokio cpp nsync glib posix", other, " ")
}

FNR == NR {
    if ($0 ~ /^#/ || NF < 7) next
    rows++
    figure[rows] = $2; label[rows] = $3; unit[$2] = $4 == "-" ? "" : $4
    conditions[rows] = $5 == "-" ? "" : $5; target[rows] = $6 == "-" ? "" : $6; beside[rows] = $7 == "-" ? "" : $7
    next
}

NF >= 3 { sample[$1 ":" $2, ++count[$1 ":" $2]] = $3 + 0 }

# Median, least and most of a figure of someone.
function sort_samples(id,    i, j, x) {
    if (id in sorted) return
    sorted[id] = 1
    for (i = 2; i <= count[id]; i++) {
        x = sample[id, i]
        for (j = i - 1; j >= 1 && sample[id, j] > x; j--) sample[id, j + 1] = sample[id, j]
        sample[id, j + 1] = x
    }
}

function median(id,    n) {
    sort_samples(id)
    n = count[id]
    return n % 2 ? sample[id, (n + 1) / 2] : (sample[id, n / 2] + sample[id, n / 2 + 1]) / 2
}

function commas(text,    out) {
    while (length(text) > 3 && text ~ /^[0-9]+$/) {
        out = "," substr(text, length(text) - 2) out
        text = substr(text, 1, length(text) - 3)
    }
    return text out
}

function number(x,    a) {
    a = x < 0 ? -x : x
    if (a == 0) return "0"
    if (a < 10) return sprintf("%.2f", x)
    if (a < 100) return sprintf("%.1f", x)
    return commas(sprintf("%.0f", x))
}

function joined(list, item) { return list == "" ? item : list ", " item }

function with_unit(x, u) { return number(x) (u == "" ? "" : u == "x" ? "x" : " " u) }

# The sample key that a name in a condition stands for.
function key(name, row) { return name ~ /:/ ? name : name ":" figure[row] }

function spoken(name,    part) {
    if (name !~ /:/) return word[name]
    split(name, part, ":")
    if (part[1] != "ours") return word[part[1]]
    return part[2] in named ? named[part[2]] : part[2] == "value_depth_1" ? "depth 1" : part[2]
}

# Judge one condition: sets `said` (what was measured, if it is a ratio) and returns 1, 0, or -1 for what is missing.
function judge(condition, row,    part, limit, at_most, left, right, x) {
    said = ""
    at_most = condition ~ /<=/
    split(condition, part, at_most ? "<=" : ">=")
    limit = part[2] + 0
    left = part[1]; right = ""
    if (left ~ /\//) {
        right = left; sub(/.*\//, "", right); sub(/\/.*/, "", left)
    }
    if (left == "worst") {
        x = sample[key("ours", row), count[key("ours", row)]] / median(key("ours", row))
        said = "worst " sprintf("%.2f", x) "x"
    } else {
        if (!count[key(left, row)] || (right != "" && !count[key(right, row)])) return -1
        x = median(key(left, row))
        if (right != "") {
            if (median(key(right, row)) == 0) return -1
            x /= median(key(right, row))
            if (left == "ours") said = sprintf("%.2f", x) "x the time of " spoken(right)
            else said = sprintf("%.1f", x) "x faster than " spoken(left)
        }
    }
    return at_most ? x <= limit : x >= limit
}

function cell(row, column, text) {
    table[row, column] = text
    gsub(/[^ -~]/, "?", text)
    if (length(text) > width[column]) width[column] = length(text)
}

END {
    n_columns = split(short ? "figure|this library|Go|others|target|met" \
                            : "figure|ours|spread|Go|others|against|target|met", title, "|")
    lines = 0
    for (c = 1; c <= n_columns; c++) { width[c] = 3; cell(0, c, title[c]) }
    for (r = 1; r <= rows; r++) {
        f = figure[r]; u = unit[f]; ours = "ours:" f
        if (only != "" && index(f, only) == 0) continue
        if (short && target[r] == "") continue
        split("", named)
        if (beside[r] != "") {
            at = index(beside[r], "=")
            named[substr(beside[r], 1, at - 1)] = substr(beside[r], at + 1)
        }
        seen = count[ours] || count["go:" f]
        for (o = 1; o <= others; o++) seen = seen || count[other[o] ":" f]
        if (!seen && target[r] == "") continue

        around = ""
        for (o = 1; o <= others; o++)
            if (count[other[o] ":" f]) around = joined(around, word[other[o]] " " number(median(other[o] ":" f)))
        for (name in named)
            if (count["ours:" name]) around = joined(around, named[name] " " number(median("ours:" name)))

        against = ""; met = ""
        if (target[r] != "") {
            n = split(conditions[r], condition, " ")
            met = "yes"
            for (i = 1; i <= n; i++) {
                verdict = count[ours] ? judge(condition[i], r) : -1
                if (count[ours] && said != "") against = joined(against, said)
                if (verdict == 0) met = "**no**"
                else if (verdict < 0 && met == "yes") met = "not measured"
            }
            tally[met]++
        } else if (count[ours] && count["go:" f] && median(ours) > 0 && u == "ns")
            against = sprintf("%.1f", median("go:" f) / median(ours)) "x faster than Go"

        value = count[ours] ? with_unit(median(ours), u) : ""
        spread = count[ours] ? number(sample[ours, 1]) " to " number(sample[ours, count[ours]]) : ""
        if (count[ours] && sample[ours, 1] == sample[ours, count[ours]]) spread = ""
        go = count["go:" f] ? number(median("go:" f)) : ""
        if (go == "" && match(conditions[r], /go:[a-z_]+/)) {
            name = substr(conditions[r], RSTART, RLENGTH)
            if (count[name]) go = number(median(name))
        }
        lines++
        c = 0
        cell(lines, ++c, label[r]); cell(lines, ++c, value)
        if (!short) cell(lines, ++c, spread)
        cell(lines, ++c, go); cell(lines, ++c, around)
        if (!short) cell(lines, ++c, against)
        cell(lines, ++c, target[r]); cell(lines, ++c, met)
    }
    for (l = 0; l <= lines; l++) {
        for (c = 1; c <= n_columns; c++) printf "| %-" width[c] "s ", table[l, c]
        print "|"
        if (l == 0) {
            for (c = 1; c <= n_columns; c++) {
                dashes = sprintf("%" width[c] "s", ""); gsub(/ /, "-", dashes)
                printf "|-%s-", dashes
            }
            print "|"
        }
    }
    printf "\n%d targets met, %d missed, %d not measured.\n", tally["yes"], tally["**no**"], tally["not measured"]
}

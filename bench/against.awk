# Turn pairs of samples into a table. Input: `side<TAB>round<TAB>figure<TAB>value<TAB>unit`, one line a sample; side is
# `then` or `now`. For each figure: the median of each side's rounds, and the ratios of its rounds.
# -v only=TEXT: only figures that contain TEXT.

BEGIN { FS = "\t" }

NF >= 4 && index($3, only) {
    if (!($3 in unit)) { order[++n_figures] = $3; unit[$3] = $5 }
    sample[$1, $3, $2, ++count[$1, $3, $2]] = $4 + 0
    if ($2 > rounds) rounds = $2
}

function sort_list(list, n,    i, j, x) {
    for (i = 2; i <= n; i++) {
        x = list[i]
        for (j = i - 1; j >= 1 && list[j] > x; j--) list[j + 1] = list[j]
        list[j + 1] = x
    }
}

function median(list, n) { return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2 }

# The median of a side's samples of a figure in one round.
function of_round(side, figure, round,    i, n, list) {
    n = count[side, figure, round]
    for (i = 1; i <= n; i++) list[i] = sample[side, figure, round, i]
    sort_list(list, n)
    return median(list, n)
}

function number(x,    a) {
    a = x < 0 ? -x : x
    return a == 0 ? "0" : sprintf(a < 10 ? "%.2f" : a < 100 ? "%.1f" : "%.0f", x)
}

# Work that grows with the number of threads is in `x`: there, more is better.
function ratio(then, now, u,    x) {
    if (then == now) return 1
    if (then <= 0 || now <= 0) return -1
    return u == "x" ? then / now : now / then
}

# A figure of the machine, the clock, the system or code by hand: it says how quiet the machine was.
function is_yardstick(figure) {
    return figure ~ /^(empty_loop|clock|mutex_pair|nanosleep_|group_work_alone|xargs_sha256sum)/ ||
        figure ~ /(_clock|_futex|_futex_sleeping|_by_hand|_nothing_sleeping)$/
}

# Figures in which a child context is made and ended depend on where its memory lies, and vary more. Where threads take
# turns on all cores, a figure depends on where the system places them: one header beside itself has come to 0.5 and to
# 1.4 in two rounds. Of the waits of a millisecond the ratios of the waiter are judged, by their target: a header beside
# itself came to 1.00 to 1.02 in seven rounds, so take more of them where 1.02 matters.
function limit(figure) {
    if (figure ~ /^hand_2_/) return 2.00
    if (figure ~ /^hand_long_/) return 1.30
    if (figure ~ /^hand_ms_waiter_.*_ratio$/) return 1.02
    if (figure ~ /^hand_ms_/) return 1.20
    return figure ~ /^(cancel_child|timeout_child|request|timers_|value_attach)/ ? 1.10 : 1.05
}

END {
    print "| figure | unit | then | now | ratio (median) | spread | mark |"
    print "|---|---|---|---|---|---|---|"
    for (f = 1; f <= n_figures; f++) {
        figure = order[f]
        pairs = 0; broken = 0
        for (r = 1; r <= rounds; r++) {
            if (!count["then", figure, r] || !count["now", figure, r]) continue
            pairs++
            then[pairs] = of_round("then", figure, r)
            now[pairs] = of_round("now", figure, r)
            ratios[pairs] = ratio(then[pairs], now[pairs], unit[figure])
            if (ratios[pairs] < 0) broken = 1
        }
        if (!pairs) {
            side = ""
            for (r = 1; r <= rounds; r++) if (count["now", figure, r]) side = "now"
            if (side == "now") added = added " " figure; else gone = gone " " figure
            continue
        }
        compared++
        sort_list(then, pairs); sort_list(now, pairs); sort_list(ratios, pairs)
        middle = median(ratios, pairs)
        mark = ""
        if (broken) {
            # Zero, or the difference of two times that came out negative. A count that was zero must stay zero.
            if (median(then, pairs) == 0 && median(now, pairs) > 0) mark = "**grew**"
        } else if (is_yardstick(figure)) {
            mark = "yardstick"
        } else if (middle > limit(figure)) mark = "**" sprintf("> %.2f", limit(figure)) "**"
        if (mark ~ /\*\*/) marked++
        printf "| %s | %s | %s | %s | %s | %s | %s |\n", figure, unit[figure], number(median(then, pairs)),
            number(median(now, pairs)), broken ? "" : sprintf("%.3f", middle),
            broken || pairs == 1 ? "" : sprintf("%.3f to %.3f", ratios[1], ratios[pairs]), mark
    }
    printf "\n%d figures compared, %d marked.\n", compared, marked
    if (added != "") print "Only now:" added "."
    if (gone != "") print "Only then:" gone "."
}

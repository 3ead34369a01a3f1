"""The plots of the built-in stories and how their passages are worded.

Notable: a plot is a wish, an obstacle, attempts, help, an outcome and an ending that returns to the beginning. Which
words come next is decided by the plot and by what it introduced, rarely by the three words before. `stories` explains
the template language. A paragraph of a template is a block of lines; blank lines part paragraphs. Built in chapter 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DETAIL = (0, 0, 0, 0, 0, 1, 1, 1, 2, 2)

_BOTH, _KID, _WILD = ("kid", "wild"), ("kid",), ("wild",)


@dataclass(frozen=True)
class Plot:
    """A plot: the kinds of world it can happen in, its template, and things of the world that it fixes beforehand."""

    worlds: tuple[str, ...]
    template: str
    fixed: dict[str, str] = field(default_factory=dict)


def _plot(worlds: tuple[str, ...], text: str, **fixed: str) -> Plot:
    paragraphs = (" ".join(block.split()) for block in text.strip().split("\n\n"))
    return Plot(worlds, "\n".join(paragraphs), fixed)


MACROS: dict[str, list[str]] = {
    "open": [
        "[Once upon a time|Once|Long ago|One year] there [was|lived] a [little|young|{trait}] {h.kind} named {H}. "
        "{h} lived in a {nest} and [loved|liked] {hobby}.",
        "{H} was a {trait} {h.kind} who lived in a {nest}. [Most of all|More than anything|Above all], "
        "{he} [loved|liked|enjoyed] {hobby}.",
        "in a {nest} lived a {trait} {h.kind} named {H}. {h} [was always|spent whole days|was fond of] {hobby}.",
        "there was once a {trait} {h.kind} called {H}. {h.s} home was a {nest}, and {his} [joy|pride|hobby] was {hobby}.",
        "a {trait} {h.kind} named {H} lived in a {nest}. Nobody was better at {hobby}.",
    ],
    "treasure": [
        "{h.s} [best|dearest] [thing|treasure] was a {oc}. {h} [liked|loved] to {do}. "
        "<It was dearer to {h.o} than {his} {xc}.>",
        "{h} had a {xc} and a {oc}, but [liked|loved] the {o} more. <Every day {he} {did}.>",
        "{M} had given {h.o} a {oc}. [Every morning|Every day|After lunch] {h} {did}, and {his} {xc} was left [alone|on the shelf].",
        "next to {his} bed {h} kept a {xc} and a {oc}. The {o!} was [special|the best]: {h} [could|would] {do} for hours.",
    ],
    "when": [
        "one {weather} {day}",
        "one {day}, when {sky}",
        "on a {weather} {day}",
        "it was a {weather} {day}, and",
    ],
    "pal.kid": ["{his} friend {F}", "{his} neighbor {F}", "a {f.kind} named {F}", "{his} [best|good|old] friend {F}"],
    "pal.wild": ["{his} friend {F} the {f.kind}", "a {f.kind} named {F}", "{F}, a {trait2} {f.kind},"],
    "palo.kid": ["{his} friend {F.o}", "{his} neighbor {F.o}", "a {f.kind} named {F.o}"],
    "palo.wild": ["{his} friend {F.o} the {f.kind}", "a {f.kind} named {F.o}"],
    "thanks": [
        '"[Thank you|Thanks|Thank you so much], {f!}," said {H}[| with a smile|, smiling].',
        '"[Oh, thank you|You did it|You are the best|How can I thank you], {f!}!" {h} [cried|called|laughed].',
        "{h} [thanked|hugged] {f!.o}[ again and again| and laughed| with all {his} heart|].",
    ],
    "sad": [
        "{h} felt [sad|awful|terrible|very small].",
        "a tear ran down {h.s} [cheek|nose].",
        "{h} [sat down and cried|hung {his} head|did not know what to do|wanted to cry].",
    ],
    "glad": [
        "{h} [laughed with joy|jumped for joy|was so happy|beamed|clapped|could not stop smiling].",
        "what a happy {h.kind} {h} was!",
        "{h} felt [warm inside|as light as a feather|proud and glad].",
    ],
    "bedtime": [
        "[that night|that evening|when night fell], {evening}.",
        "[later|at last] {evening}, and the day was over.",
        "soon {evening}.",
    ],
    "endo": [
        "@bedtime [Back|At home] in the {nest}, {h!} [put|laid] the {o!} next to the {x} and [thought of|smiled about] {f!.o}.",
        "from [that day on|then on], whenever {h!} [saw|looked at|picked up] the {o!}, {he} [thought of|remembered] {f!.o}.",
        "@bedtime In the {nest}, {h!} told {M.o} about {f!.o} and the {o!}. [Then {he} fell asleep|{M} smiled].",
        "[Now|After that] {h!} and {f!} often [met|played] {pin}, and the {oc} always [came along|went with them].",
        "[to this day|even now], {h!} [keeps|has] the {oc} in the {nest}, and [{f!} still comes to see it|{f!} often comes to visit].",
    ],
    "endh": [
        "@bedtime [Back|At home] in the {nest}, {h!} [told|wrote] {M.o} all about {f!.o} [before going to sleep|until {he} fell asleep].",
        "after that, {h!} still loved {hobby}, but now {f!} [came along|joined in|was always there too].",
        "[from then on|ever since], {h!} and {f!} [were|have been] the best of friends, and {pin} you could see them {hobby}.",
        "@bedtime {h!} went home to the {nest}, and {f!} waved [for a long time|until it was dark].",
    ],
    "highhelp.kid": [
        '@pal [saw it|came by|was watching]. "[Wait|Do not worry], {h!}, I have a {tool} at home," said {F}. {f} [ran home|was gone] and soon '
        "came back with the {tool}. {F} [held|lifted] the {tool} [up|high], [gave a little push|moved it to and fro], and down came the {o!}.",
        '{H} [ran|went] home to ask {M.o}. "[Maybe|I think] {f!} has a {tool}," said {m}. And [indeed|so it was]: @pal had one. '
        "[Together|With great care] they [carried|brought] the {tool} to the {p}, and {F} got the {o!} down with it.",
    ],
    "highhelp.wild": [
        '@pal [saw it|came by|was watching]. "[Wait|Do not worry], {h!}, a {f.kind} can climb [well|very high]," said {F}. '
        "{f} climbed up and up, [shook it free|took hold of it], and down came the {o!}.",
        '"[I cannot climb|A {h.kind} is no climber]," {h} thought, "but {f!} can." {h} ran to fetch @palo. The {f.kind} climbed '
        "[up without fear|to the very top] and came back with the {o!}.",
    ],
    "waterhelp.kid": [
        '@pal [saw it|came by|was watching]. "[Wait|Do not worry], {h!}, I will get my {tool}," said {F}. {f} [ran home|was gone] and soon '
        "came back with the {tool}. {F} [leaned out|lay down], reached for the {o!} with it, and pulled it [out|to the edge].",
        '{M} [came|looked up]. "Ask {f!}," said {m}. "There is a {tool} in {f.s} shed." So {H} [ran|hurried] to @palo. They brought the {tool} '
        "[at once|to the {p}], and {F} [caught|hooked] the {o!} and drew it [in|out].",
    ],
    "waterhelp.wild": [
        '@pal [saw it|came by|was watching]. "[Wait|Do not worry], {h!}, a {f.kind} can swim [well|in any water]," said {F}. '
        "{f} [dived in|jumped in|slid in], [took hold of it|swam around it], and pushed the {o!} [to the edge|out].",
        '"[I cannot swim|A {h.kind} is no swimmer]," {h} thought, "but {f!} can." {h} ran to fetch @palo. The {f.kind} swam '
        "[out without fear|as fast as a fish] and came back with the {o!}.",
    ],
    "holehelp.kid": [
        '@pal [saw it|came by|was watching]. "[Wait|Do not worry], {h!}, I have a {tool}," said {F}. {f} [ran home|was gone] and soon '
        "came back with the {tool}. {F} let the {tool} down, [turned it|moved it to and fro], and up came the {o!}.",
        '{M} [came|looked up]. "Ask {f!}," said {m}. "You need a {tool}." So {H} [ran|hurried] to @palo. They brought the {tool} '
        "[at once|to the {p}], and {F} [caught|hooked] the {o!} and drew it [up|out].",
    ],
    "holehelp.wild": [
        '@pal [saw it|came by|was watching]. "[Wait|Do not worry], {h!}, a {f.kind} can squeeze [in anywhere|through any gap]," said {F}. '
        "{f} [breathed out|pulled in {f.his} tummy], [slipped inside|went in], and pushed the {o!} [up|out].",
        '"[I am too big|A {h.kind} is too big for this]," {h} thought, "but {f!} is not." {h} ran to fetch @palo. The {f.kind} squeezed '
        "[in without fear|in like a worm] and came back with the {o!}.",
    ],
    "lessonhelp": [
        "{h} had learned that [asking for help|a friend] is [better than crying|worth more than a {o}].",
        '"What one cannot do, two can," {M} said [that evening|later] to {h!.o}.',
        "[so|and so] {h} learned to ask {f!.o} for help [sooner|right away].",
        "",
    ],
    "lessontruth": [
        "{h} never [lied to|hid anything from] {f!.o} again.",
        "{h} had learned that the truth [weighs less than a lie|is the best glue].",
        '"The truth is hard for a minute, and a lie is hard all day," {M} told {h!.o}.',
        "and {h} felt [light|free] again, because there was nothing to hide from {f!.o}.",
    ],
    "lessonshare": [
        "{h} had learned that [sharing makes things bigger|things are better when they are shared].",
        '"What you share comes back," {M} told {h!.o}.',
        "from then on {h} shared [gladly|everything] with {f!.o}.",
        "so {h} and {f} learned to share.",
    ],
    "lessonfear": [
        "{h} had learned that being brave means being afraid and [going on|doing it anyway].",
        '"Brave is who shakes and goes on," {M} said to {h!.o}.',
        "{h} was still a bit afraid of {fear}, but now {he} knew what to do.",
    ],
    "lessongift": [
        "{h} learned that a present you work for [is the best|makes two people happy].",
        '"The best part of it is your work," {M} told {h!.o}.',
        "{h} was prouder of the {o!} than if {he} had [bought|found] it.",
    ],
    "lessonsmall": [
        "to help someone small is a big thing.",
        "{h} learned that [the smallest voice|a small voice] needs [the best ears|a good listener].",
        "[now|then] {h} was [happy|glad] too.",
    ],
    "lessoncook": [
        "{h} learned to [look twice|look before pouring].",
        '"A mistake is only the first half of a recipe," {M} told {h!.o}.',
        "after that {h} never mixed up {wrong} and {spice} again.",
    ],
    "lessonrain": [
        "{h} learned that a good friend is better than good weather.",
        '"Sunshine is where your friends are," {M} told {h!.o}.',
        "and {h} was almost thankful for the rain.",
    ],
    "lessoncontest": [
        "{f} never bragged about the {contest} again.",
        "{h} had learned that [winning is not the best prize|a friend is the best prize].",
        '"You came last and won," {M} said to {h!.o}.',
    ],
    "lessonnoise": [
        "{h} learned that [most things are smaller by day|a scary sound is often a small thing].",
        '"Look first, and then be afraid," {M} told {h!.o}.',
        "after that no {noise} could scare {h!.o}.",
    ],
    "lessonstranger": [
        "a good deed [comes back|is never lost].",
        '"Kindness goes around and comes home," {M} told {h!.o}.',
        "after that {h} and {f} [often helped|visited] the {k.kind} together.",
    ],
    "lessonbuild": [
        "{h} learned to [take {his} time|listen to good advice].",
        '"Slow hands build high," {M} told {h!.o}.',
        "{h} had learned more from the first {building} than from the second.",
    ],
    "lessonnew": [
        "{h} learned that one hello can change a day.",
        '"Every friend was new once," {M} told {h!.o}.',
        "nobody whispered about {f!.o} any more.",
    ],
    "lessonlost": [
        "{h} promised never to go past the {p} alone again.",
        '"Next time, listen to me before you follow a {lure}," {M} told {h!.o}.',
        "{h} learned to look back at the way now and then.",
    ],
    "lessonbirthday": [
        "{h} learned that quiet friends may be busy friends.",
        '"We could never forget you," {M} told {h!.o}.',
        "{h} was a little ashamed, but mostly happy.",
    ],
}

PLOTS: tuple[Plot, ...] = (
    # Lost: a treasure is gone, a friend asks the right question.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when, {H} took the {o} [along to|to] the {p}. [Before lunch|On the way home|A little later], {h} [reached for it|
        wanted to {do}], but it was gone. "[Oh no|Oh dear|Help]! My {o!} is [lost|gone]!" {he} [cried|wailed|said].

        {H} [ran|hurried|rushed] back and looked {p1}. [There was only {junk}|All {he} found was {junk}]. <Then {he} looked
        {p2}, [but the {o!} was not there|with no luck].> [@sad|]

        Just then @pal came [by|along|past]. "[Why are you so sad|What is the matter|What are you looking for], {h!}?" asked
        {F}. "I have lost my {oc}," {h} [said|sobbed|answered]. "[Think back|Let us think]," said {F}. "Where were you
        before?" {H} [thought hard|closed {his} eyes and thought]. "I was {qin}," {he} said.

        [So they|Together they|The two friends] [went|hurried] to the {q}. {F} looked {q1}, and {H} looked {q2}. And there,
        {q3}, [lay|was] the {o!}! "[Here it is|I see it]!" [called|shouted] {F}. @glad @thanks

        [Since then|After that], {h!} [always put|never forgot to put] the {o!} back [in its place|where it belonged]. @endo
        """,
    ),
    # Stuck: high up, in the water, in a hole; help comes from a friend who can do what the hero cannot.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when, {H} [played|was playing] {pin} with the {oc}. [Suddenly|All at once|But then] [a gust of wind|a strong wind]
        [tore it away|carried it off|pulled it up], and it got stuck {tree}.

        {H} [jumped|stretched|stood on tiptoe], but {he} could not reach the {o!}. <{h} threw {junk} at it, but [missed|it did not
        move].> "[Now I will never {do} again|I will never get my {o!} back|What shall I do]," {h} [said sadly|sighed].

        @highhelp

        <"You are [so clever|so brave|wonderful], {f!}," {H} said.> @thanks "Would you like to {do} too?" {F} [nodded|said yes|did not wait to
        be asked twice]. So they took turns, first {f!}, then {h!}, until {evening}.

        @lessonhelp @endo
        """,
        where="T",
        gift="climb",
    ),
    _plot(
        _BOTH,
        """
        @open @treasure

        @when, {H} [carried|took] the {oc} to the {p}. {h} [slipped|stumbled|tripped] [on a wet stone|over a root|on the grass],
        and the {o!} [fell|flew|rolled] into {water}. [It floated away|Splash|It drifted off]!

        {H} [reached out|leaned forward|stretched], but the {o!} was too far [out|away]. <{h} poked at it with {junk}, but it
        [only drifted on|would not come].> "[Please come back|Do not float away|Oh, my {o!}]!" {h} [called|cried|begged]. [@sad|]

        @waterhelp

        @thanks <{H} [dried|shook] the {o!} and held it [tight|close].> "I will [never|not] play so near {water} again," {he} said.

        @lessonhelp @endo
        """,
        where="W",
        gift="swim",
    ),
    _plot(
        _BOTH,
        """
        @open @treasure

        @when, {H} sat {pin}, {doing}. [Suddenly|Then|All at once] the {o!} slipped [away|out of {his} grip] and [rolled|fell|dropped]
        into {hole}.

        {H} [reached in|lay down and looked], but it was too [deep|dark|narrow]. "I can see my {o!}, but I cannot get it,"
        {he} [sighed|said|groaned]. <{h} tried with {junk}, but it [was too short|bent].> [@sad|]

        @holehelp

        "[It is not even scratched|It is only a bit dusty|It is as good as before]," said {F}. @glad @thanks

        @lessonhelp @endo
        """,
        where="H",
        gift="squeeze",
    ),
    # Broken: something borrowed breaks; the truth is hard, and then easy.
    _plot(
        _BOTH,
        """
        @open {h} [often|always] [played|met] with @palo. {F} had a {oc}, and {h!} had a {xc}.

        @when, {F} said, "I must [go|help {M.o}] for a while. Will you look after my {o!}, {h!}?" "[Of course|I will|Yes]," said
        {H}. {h} could not wait to {do}. But [{he} was not careful|{he} was too wild|{he} pulled too hard], and it {broke}.

        {H} was [scared|frightened|very still]. {h} hid the {o!} {p1}. [When|As soon as] {F} came back, {f.he} asked, "Where is my
        {o!}?" "[I do not know|Maybe the wind took it|A bird took it]," {h!} [lied|said softly]. {F} looked {p2} and {p3}, and [was very sad|began to cry].

        {H.s} [heart|tummy] felt heavy. "{f!}, I did not tell the truth," {he} said [at last|then]. "I broke your {o!}. It {broke},
        and I hid it {p1}. I am sorry." {F} was quiet [for a while|for a moment]. "I am sad about it," said {F}, "but I am glad that you [told me|were honest]."

        [Together they|So the two of them|Then they] [found|got] some {mender} and fixed the {o!}. <It [took a long time|was hard work], but {h!} did not give
        up.> "[It looks like new|Now it is even better]," said {F}. "And you can have my {x!} [for a week|until Sunday]," said {H}.

        @lessontruth @endo
        """,
    ),
    # Quarrel: two pull at one thing.
    _plot(
        _BOTH,
        """
        @open [{M} gave {h.o} a {oc} one day|{h} owned a {xc}, and then got a {oc} from {M.o}]. {h} wanted to {do} [all day|from morning till night].

        @when, @pal [came to play|came over]. <{F} had brought a {xc}, but {f.he} [soon forgot|did not want] it.> "[May I|Can I] [try|hold|have] your {o!}, {h!}?" asked {F}.
        "No, it is mine," said {H}. "[You never share|That is not fair]," [cried|said] {F}, and [grabbed|took hold of] the {o!}.

        {h!} pulled, and {f!} pulled. [Snap|Crack|Oh no]! The {o!} {broke}. Now nobody could {do}. {F} [cried|ran off], and
        {h!} [cried too|stamped {his} foot|was angry].

        {M} [heard the noise|saw it all] and came [out|over]. "{h!}, what is a {o} worth when nobody plays with you?" {m} asked.
        {H} looked at the {o!} and [thought about it|was quiet]. {h} [went|walked] to {f!.o} and said, "I am sorry, {f!}. [I should have shared|Friends should share]."
        "I am sorry that I pulled," said {F}.

        {M} [brought|fetched] some {mender}, and together they [mended|repaired|fixed] it. [Then|Now] they took turns: {f!} {did}, and then {h!} did. It was [twice|much] more fun [than alone|that way].

        @lessonshare @endo
        """,
    ),
    # Fear: a fear met with a friend, a trick and something to hold.
    _plot(
        _BOTH,
        """
        @open [There was only one thing wrong|But {he} had one secret|Only one thing made {h.o} shake]: {h} was afraid of {fear}.
        <When there was talk of {fear}, {h} [held|hugged] {his} {xc} and hid.>

        @when, {H} went to the {p} with @palo. {F} had a {oc} and went ahead [to {do}|with it]. [Suddenly|Then] {h} heard {f.him}
        call, "Help, {h!}! [My foot is stuck|I cannot get out|I am hurt]!" {h} [ran|started] toward the voice, but then stopped. {scene}. It was {fear} that lay between {h.o} and {f!.o}.

        {H.s} [knees|legs] shook. "I am afraid of {fear}," {he} called. "I know," {F} called back. "[Do this|Here is a trick|Try it my way]: {advice}."
        [{H} took a deep breath|{H} swallowed hard]. {h} did what {f!} had said, and went on, step by step. {h} {dared}[, and nothing bad happened|, and it was not so bad]!

        There [sat|lay] {f!} {p1}. {H} [pulled|helped] {f.him} [free|up]. "You were afraid of {fear}, and still you came," said
        {F}. "Take my {oc}. You [earned it|are a hero]." {h} [held|took] the {o!} and [blushed|smiled|grinned].

        @lessonfear <{h} put the {o!} beside the {x}.> @endh Nobody ever said again that {h!} was afraid of {fear}.
        """,
    ),
    # Gift: a present is earned by work.
    _plot(
        _BOTH,
        """
        @open [It was almost {m.s} birthday|{M} had a birthday coming|Soon it would be {m.s} birthday], and {h} wanted to give {m.him} [something special|a fine present].

        {H} [went|walked] to the {p}. There {h} met a {k.kind} who was {k.work}. Beside {k.him} [stood|lay] a {xc} and a {oc}. "[How pretty|What a fine {o!}|{M} would love that {o!}]," {h} [said|thought aloud]. "How much is [it|that]?"
        "More than you have," {k.said} {K}.

        @sad "[Could I work for it|May I earn it|What can I do for it]?" {h} asked. {K} [thought|looked at {h.o}]. "If you help with {chore}, the {o!} is yours," {k} {k.said}. So {h!} {chored} [all day|until noon|for three days].
        [Then|Soon] @pal came by. "[Come and play|Leave that], {h!}," said {F}. "Not until I am done," said {H}.

        So {f!} helped with {chore} too[| for the rest of the day|, and it went twice as fast]. At last {K} nodded. "[Well done|Good work], {h!}. Here is your {oc}."

        [On the birthday|When the day came], {H} gave {M.o} the {o!}. "[Did you buy this|Where did you get this], {h!}?" asked {M}. "I got it for {chore}, and {f!} helped me," said {H}. {M} [hugged|kissed] {h.him} and {did} [at once|right away].

        @lessongift @endo
        """,
    ),
    # Seed: waiting is hard.
    _plot(
        _BOTH,
        """
        @open [In spring|One spring day|When spring came], {M} gave {h.him} a {crop} seed. @pal got a {crop2} seed. "[Plant them|Put them in the earth], and wait," said {M}.

        {H} planted {h.his} {crop!} seed {p1}, and {F} planted the {crop2!} seed {p2}. [Every morning|Each day] they [ran|went] to the {p} with water. But [nothing happened|no leaf showed|there was only earth].

        [After a week|A week later|Soon] {h!} [lost patience|grew tired of waiting]. "My {crop!} will never grow," {he} [grumbled|said], and dug it up. There was a [tiny|thin|pale] [root|white thread] on it! "[Oh no|Oh dear]! I have hurt it," {h} [cried|said]. [@sad|]

        {F} came and looked. "Put it back [quickly|gently], {h!}," {f} said. "{M} says that seeds [need|want] time." {H} [covered it|put it back {p1}] and [gave it water|patted the soil]. [To keep from digging|While waiting], {h} went back to {hobby}, and {f!} [kept {h.o} company|helped].

        [Weeks went by|The weeks passed|Then came summer]. [One morning|One day] {F} [shouted|called], "[Come quickly|Look], {h!}!" {p1} stood [a tall|a strong|a fine] {crop!} plant, and {p2} stood the {crop2!} plant. @glad "You see?" said {M}. "[Good things need time|What grows slowly grows well|A seed cannot be hurried]."

        [In the end|That autumn|When all was ripe], they [shared|brought home] what had grown. {H} gave {f!.o} [half|some] of the {crop!}, and {f!} gave {h.o} [half|some] of the {crop2!}. @endh
        """,
    ),
    # A lost young animal is brought home.
    _plot(
        _BOTH,
        """
        @open

        @when, {H} was {hobby} {pin}. [Suddenly|Then|All at once] {h} heard a small sound: "{call}, {call}!" {p1} sat a {baby}, [all alone|wet and cold|shaking].
        "[Where is your mother|Are you lost], little one?" {h} asked. The {baby!} only said, "{call}!"

        {H} [gave it some {feed}|found some {feed} for it], and the {baby!} ate. [It must have been hungry|Then it felt better]. "I will take you home," {h} [promised|said]. [But where was home|But {he} did not know the way]?

        On the path {h} met @palo. "[Is that a {baby2}|Do you have a {baby2} there], {h!}?" asked {F}. "No, it is a {baby!}," said {H}. "[Listen|Hear how it calls]." "{call}!" [went|said] the {baby!}. "Then its mother is a {mother}," said {F}. "[I saw one|There is one] near {shelter}."

        [First they came to|On the way they saw] a {mother2}. "[Is this yours|Have you lost a child]?" asked {H}. The {mother2} shook her head. Her {baby2!} was [beside|with] her. [So they|Then they] [walked|went] on to {shelter}. There a {mother} was [calling|running about]. "{call}!" cried the {baby!}, and [ran|hurried] to her. The {mother} [was overjoyed|nuzzled her {baby!}].

        "We did it, {f!}," said {H}. <{h} was a little sad to see the {baby!} go.> "[You did|It was you], {h!}," said {F}. "You did not leave it alone." @lessonsmall @endh And [sometimes|at times], from {shelter}, [somebody|a voice] called, "{call}!"
        """,
    ),
    # Cooking: the wrong jar.
    _plot(
        _BOTH,
        """
        @open [{h} wanted to make {afood} for {M.o}|It was {m.s} birthday, and {h} wanted to make {afood}|{M} was ill, and {h} planned to make {afood}]. <{M} liked it [even|much] more than {food2}.>

        [{H} asked @palo to help|{H} and @pal started early]. {F} [washed|chopped|fetched] the {taste}, and {H} stirred. "[Now the|It needs] {spice}," said {F}. {H} was thinking of {hobby} and took the wrong jar. In went the {wrong} [instead of|and not] the {spice}!

        The {food!} was [done|ready]. {F} [tried|tasted] it [first|carefully]. "[Ugh|Oh dear|Yuck]! [{h!}, what is in this {dish}|What did you put in, {h!}]?" {f} [cried|coughed]. {H} looked at the jar. "[It says {wrong}|This is {wrong}]," {he} [whispered|said]. "I have spoiled the {food!}." [@sad|]

        "[We have time|Do not cry|Never mind], {h!}," said {F}. "We can [start again|make a new one]." [This time|Now] {H} read [each|every] label aloud. {f!} [checked|held] the {spice}, and {h!} {stirred}. Soon the [whole|entire] {nest} smelled of {food!}.

        {M} [came in|sat down] and [took a bite|tasted it]. "[Mmm|Oh]! This is the best {food!} I ever had," said {M}. <{H} and {F} looked at each other and [laughed|giggled].> "It is our second one," said {H}, and {he} told {M.o} about the {wrong}.

        @lessoncook @endh
        """,
    ),
    # Plans and rain.
    _plot(
        _BOTH,
        """
        @open [For days|All week], {h} and @pal had planned a picnic {pin}. {H} would bring {afood}, and {F} would bring {afood2}. <{F} had [also|even] packed {f.his} {oc}.>

        On {day} [morning|at dawn] {H} [looked out|woke up]. Rain! [It poured|It rained] and rained. "[No picnic today|Our picnic is spoiled]," {h} said, and [pushed away|put down] the {food!}. @sad

        [Knock, knock|There was a knock at the door]. There stood {f!}, [dripping wet|wet from head to toe], with the {food2!} under one arm. "[Why the long face|Why so sad], {h!}?" asked {F}. "We cannot go to the {p}," said {H}. "[Then the {p} must come to us|Then we play {p} here]," said {F}.

        [They|The two] spread a [cloth|sheet] on the floor of the {nest}. [A chair was the tree, and a pillow was the hill|The table was the forest, and they sat under it]. {F} [made|drew] a paper sun[, and {h!} hung it up|]. Then they ate the {food!} and the {food2!}, and {M} [came|sat down] too. <"[More|Some more] {food!}, {m}?" asked {H}. "[Yes, please|Gladly]," said {M}.>

        [Afterward|After the meal] they spent hours {hobby}. Nobody noticed that the rain had stopped. "[This was the best picnic|It was better than {pin}], {f!}," said {H}. @lessonrain @endh
        """,
    ),
    # Contest: the boaster, the practice, the good deed.
    _plot(
        _BOTH,
        """
        @open {h} heard of a {contest} {pin}. The prize was a {oc}. "[I would love to {do}|That {o!} would be lovely]," {h} said, and began to practice.

        @pal [laughed|sneered]. "You? I can {boast}," [bragged|boasted] {F}. "The {o!} is as good as mine. You can [keep|play with] your {xc}." @sad But [{M} said|{M} told {h.him}], "Practice, {h!}, and never mind." So [every day|each morning] {h!} {practice}, while {f!} [slept late|lay in the sun|rested].

        [The day of the {contest} came|At last the {contest} began]. [At first|From the start] {F} was [ahead|better]. But {f.he} [looked back to laugh|was not careful|was soon tired], and close to {goal} {f.he} [stumbled|stopped]. "[Ow|Oh], my [foot|leg]!" [cried|moaned] {F}. {H} could have [won|gone on] alone. The {o!} was so near!

        {H} [stopped|turned around]. "[Lean on me|Take my arm], {f!}," {he} said. Together they [reached|came to] {goal}, last of all. [Everyone cheered|People clapped]. "The prize is for the one who can {skill} best," [said|called] the judge, "but today I give the {o!} to {h!} for a kind heart."

        {F} looked [down|at the ground]. "I was [mean|rude] to you, {h!}. Can you forgive me?" "Of course, {f!}," said {H}. "[Let us both {do}|We can share the {o!}]." @lessoncontest @endo
        """,
    ),
    # Not sharing food.
    _plot(
        _BOTH,
        """
        @open <{M} [often said|always said], "Share what you have, {h!}.">

        @when, {M} gave {h.him} {afood}. {H} [took|carried] the {food!} to the {p} and sat down {p1}. @pal [came by|came along]. "[That smells good|I am so hungry], {h!}," said {F}. "May I have a little of your {food!}?" "[No|Never]," said {H}, and ate [all of it|everything] alone. {F} went away [sadly|hungry].

        [The next day|A few days later], {h!} spent the morning {hobby} far from home and forgot [to take food|{his} lunch]. Soon {his} stomach [growled|grumbled]. {F} was sitting {p2} with {afood2}. {H} did not dare to ask. [{h} remembered the {food!}|{h} thought of the {food!}] and blushed.

        "You look hungry, {h!}," said {F}. "[Come|Sit down] and have some of my {food2!}." {H} could not believe it. "But I did not give you any {food!}," {he} said. "[I know|I remember]," said {F}. "[It was not nice to be hungry|That is how I know what hunger is]. [Eat|Take the bigger half]."

        The {food2!} was the best that {h!} had ever eaten. @thanks "[Tomorrow|Next time] I will bring {afood}, and you shall have [half|the bigger half]," {h} said. And so it was: {F} got [the biggest piece|a big share] of the {food!}.

        @lessonshare @endh
        """,
    ),
    # A strange noise in the night.
    _plot(
        _BOTH,
        """
        @open @treasure

        [One night|Late one night|In the middle of the night], {h!} [woke up|sat up in bed]. {noise}! [Something|It] was {noise} {q1}. "[Who is there|What can that be]?" {h} whispered. Nobody answered. {h} [hugged|held] the {o!} and [hid under the covers|did not move] till dawn.

        [In the morning|At breakfast], {H} told {M.o} about the {noise}. "[It was a dream|You dreamed it], {h!}," said {M}. But when {h} told @palo, {f} [did not laugh|listened well]. "A {noise} sound {q1}?" said {F}. "[Let us find out|We must look]. Bring your {o!}, and I will bring my {x}."

        [That night|When it was dark], the two of them [waited|sat still] {q2}. {noise}! There it was again. {H} [held {his} breath|shook]. "[We go together|Stay close], {f!}," {he} [said|whispered]. [Step by step|Slowly] they crept [nearer|closer] and looked {q1}. It was {source}, {state}! "[Is that all|So that was it]!" laughed {F}. {H} [bent down and|carefully] {deed}, and the {noise} stopped.

        [{H} and {F}|The two friends] laughed so loudly that {M} came. "So you did not dream, {h!}," said {M}. "It was {source}." @lessonnoise @endo
        """,
    ),
    # A stranger is helped, and helps.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when, {H} was on the way to @palo. {h} wanted to show {f.him} the {o!}. {pin} {h} saw a {trait2} {k.kind} who was {k.work}. [{K} sighed|{K} looked tired]. "[So much to do|My back hurts], and nobody to help," {k.said} {K}.

        {H} [stopped|stood still]. {F} was waiting, but [{he} could not just walk on|the {k.kind} looked so tired]. "[May I help|Let me help] you," said {H}. {h} put the {o!} {p1} and {chored}. It took [a long time|all morning]. "[Bless you|You are kind], {h!}," {k.said} {K}, and gave {h.him} {k.gift}.

        [When|As soon as] {H} got to {f!.o}, {f} was [cross|angry]. "[You are late|I waited and waited], {h!}," said {F}. "I helped the {k.kind}," said {H}. "[Look|See], I got {k.gift}." "And where is the {o!}?" asked {F}. {h} turned [pale|white]. The {o!} was still {p1}, [and it was getting dark|far away]!

        They ran [back|as fast as they could], but {p1} there was nothing. @sad Then {K} [came|stepped] out of the shadows. "[Are you looking for this|Is this yours], {h!}?" {k} {k.said}, and held up the {oc}. "You helped me with {chore}, so I watched over your {o!}." @glad

        "Now I see why you stopped, {h!}," said {F}, and [was not cross any more|smiled]. @lessonstranger @endo
        """,
    ),
    # Building: the weak place.
    _plot(
        _BOTH,
        """
        @open {h} had a plan: {he} wanted to build a {building} out of {stuff}.

        [{H} asked @palo to help|@pal wanted to help], and they [met|started] {pin}. "[First {weak}|We must think of {weak}]," said {F}. "That takes too long," said {H}. "[Faster|Hurry up], {f!}!" [By noon|Soon] the {building} was [done|ready]. {h} put {his} {xc} and {his} {oc} inside.

        [Then it happened|But then came trouble|It did not last]: {fell}. {weak} had been too [weak|loose]. [The {building} was gone|Nothing was left of the {building}]. {H} [pulled|dug] the {o!} and the {x!} out of the {stuff}. "[All that work|It was all for nothing]," {h} [cried|said], and [kicked|threw] a [stone|stick].

        {F} sat down beside {h!.o}. "{fell}, because {weak} was not strong," {f} said. "[We know that now|Now we know]. [Shall we try again|Once more], {h!}?" {H} wiped {his} face. "You were right, {f!}. [This time I will listen|I should have listened]." They built it again {better}. It took [two days|until evening|three days].

        [The next day|That night] [they waited|they watched], and the new {building} stood. @glad {M} came to see it and [clapped|was amazed]. {h} put the {o!} [back|inside], and {f!} [hung up a sign|tied a ribbon to it]: "[{h!} and {f!}|Built by {f!} and {h!}]."

        @lessonbuild @endh
        """,
    ),
    # Someone new.
    _plot(
        _BOTH,
        """
        @open @treasure

        [One day|One {day}], someone new moved in [next door|nearby]: a {trait2} {f.kind} named {F}. {F} lived in a {f.home} now. {F} sat {p1} all alone and [looked at the ground|did not talk to anyone]. <The others whispered and [kept away|laughed].>

        {H} watched {f.o} [for a while|from afar]. "[I wonder why {f!} is so quiet|Maybe {f!} does not like us]," {h} said to {M.o}. "Maybe {f!} [is shy|misses home]," said {M}. "[Take your {o!}|Bring your {o!}] and say hello."

        [{H} was shy too|It was not easy], but {h} took the {oc} and [went|walked] over. "Hello, I am {H}," {he} said. "[Do you want to {do}|I like to {do}. Do you]?" {F} looked up. "[I had a {o} once|I used to have one]," {f} said [softly|quietly]. "I [lost it|left it behind] when we moved. Now I only have this {xc}." "[Then we will share|You may use mine], {f!}," said {H}.

        {F} [smiled|laughed] for the first time. [Soon|Before long] {f!} {did}, and {h!} [tried|played with] the {x!}. [Then|Later] they spent the day {hobby} until {M} called. "[Come back tomorrow|See you tomorrow], {f!}," said {H}. "[I will|Yes], {h!}," said {F}.

        @lessonnew @endo
        """,
    ),
    # The way home.
    _plot(
        _BOTH,
        """
        @open <"Never go past the {p}, {h!}," {M} [often said|always said].>

        @when, {H} saw a {lure}. It [flew|danced|drifted] this way and that. {h} followed the {lure} past the {p} and [on and on|far away]. [When {he} looked around|At last {he} stopped], nothing looked [familiar|like home]. <{h} [called|shouted] for {M.o}, but nobody heard.> {h} had only a {xc} and a {oc} with {h.him}.

        "[I am lost|Where am I]," {h} [said|whispered]. {sounds}. {h} [held|hugged] the {o!} and tried one path, but it ended {q1}. {h} tried another, and it ended {q2}. [@sad|]

        Then @pal [came along|appeared]. "[You are far from home|What are you doing here], {h!}," said {F}. "I followed a {lure}," said {H}. "I live in a {nest}, but I do not know the way." "A {nest}?" said {F}. "[I know that place|I have seen it]. [We go past the {p}|First to the {p}], and then it is not far. But the way is [dark|long]. [Let us {do}, so we are not afraid|Show me your {o!}, and we will not be bored]."

        They {ways}. [Soon|At last] {h!} saw the {p}, and then the {nest}. {M} [was at the door|came running]. "{h!}! [Where have you been|I was so worried]!" "I followed a {lure}," said {H}, "and {f!} brought me home." {M} [thanked|hugged] {f!.o} and gave {f.him} {afood}.

        @lessonlost <When {h} saw a {lure} again, {he} only waved.> {h!} gave {f!.o} the {o!} [to remember that day|as a thank-you]. @endh
        """,
    ),
    # A forgotten birthday that was not forgotten.
    _plot(
        _BOTH,
        """
        @open [Tomorrow was {h.s} birthday|It was {h.s} birthday]. {h} [hoped|wished] for a {oc}, because {he} wanted to {do}.

        But in the morning nobody [said a word|said anything]. {M} was busy with {chore}. "[Not now|Later], {h!}," said {M}. So {h!} [went|walked] to @palo. "I have no time, {h!}," said {F}, and [shut|closed] the door quickly. {h} thought {he} heard [giggling|whispers].

        {H} [went|walked] to the {p} alone and sat {p1}. [Not even {hobby} was fun|{hobby} was no fun today]. "Everyone has forgotten me," {h} [said|thought], "even {f!}." [@sad|] <Then a {k.kind} came by. "[A sad face on such a day|Why so sad], {h!}?" {k.said} {K}. "Go home. [You will see|Things will look better there]."> [Slowly|At last] {h} [went|walked] home.

        The {nest} was dark. {H} opened the door. "[Surprise|Happy birthday], {h!}!" There stood {M} and {f!}, and [on the table was|they held up] {afood} with [candles|a big candle] on it. "[Did you think we forgot|You thought we forgot]?" laughed {F}. "[I was baking the {food!}|I had to hide the {food!}]. That is why I had no time."

        From {M.o} there was a {xc}, and from {f!.o} there was a [box|parcel]. In it was a {oc}! @glad "How did you know?" asked {H}. "You talk about a {o} all day," said {F}. [They ate the {food!}|They shared the {food!}] and {did}.

        @lessonbirthday @endo
        """,
    ),
)

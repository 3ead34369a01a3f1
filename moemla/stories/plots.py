"""The plots of the built-in stories and how their passages are worded.

Notable: a plot is a wish, an obstacle, attempts, help, an outcome and an ending that returns to the beginning. Which
words come next is decided by the plot and by what it introduced, rarely by the three words before. `teller` explains
the template language. A paragraph of a template is a block of lines; blank lines part paragraphs. Built in chapter 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DETAIL = (0, 0, 0, 0, 0, 0, 1, 1, 2, 2)

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
        "[Once upon a time|Once|Long ago|One year|Years ago] there [was|lived] a [little|young|small|{trait}] {h.kind} named {H}. "
        "{h} lived in a {nest} and [loved|liked|enjoyed] {hobby}.",
        "{H} was a {trait} {h.kind} who lived in a {nest}. [Most of all|More than anything|Above all|Best of all], "
        "{he} [loved|liked|enjoyed] {hobby}.",
        "in a {nest} lived a {trait} {h.kind} named {H}. {h} [was always|spent whole days|was fond of|never tired of] {hobby}.",
        "there was once a {trait} {h.kind} called {H}. {h.s} home was a {nest}, and {his} [joy|pride|hobby|delight] was {hobby}.",
        "a {trait} {h.kind} named {H} lived in a {nest}. [Nobody was better at|Nothing was nicer for {him} than] {hobby}.",
        "{H}, a {trait} {h.kind}, lived in a {nest} with {M.o}. [On most days|Day after day|Whenever {he} could], {h!} was {hobby}.",
    ],
    "treasure": [
        "{h.s} [best|dearest] [thing|treasure] was a {oc}. {h} [liked|loved] to {do}, and {his} {xc} [came second|was forgotten].",
        "{h} had a {xc} and a {oc}, but [liked|loved] the {o} more. <[Every day|Each morning|After breakfast] {he} {did}.>",
        "{M} had given {h.o} a {oc}. [Every morning|Every day|After lunch] {h} {did}, and {his} {xc} was left [alone|on the shelf].",
        "{h} kept a {xc} and a {oc} [beside {his} bed|on a shelf|in a box]. The {o!} was [special|the best]: {h} [could|would] {do} for hours.",
        "{h} owned [two fine things|two treasures]: a {xc} and a {oc}. <[But|Still,] the {o!} was the dearer one.>",
    ],
    "when": [
        "one {weather} {day},",
        "one {day}, when {sky},",
        "on a {weather} {day},",
        "it was a {weather} {day} when",
    ],
    "color": [
        "{scenery}.",
        "{scenery}, and {h!} {wore}.",
        "{h!} {wore}.",
        "the air smelled of {smell}.",
        "{M} was {pastime}.",
    ],
    "pal.kid": [
        "{his} friend {F}",
        "{his} neighbor {F}",
        "a {f.kind} named {F}",
        "{his} [best|good|old|dear] friend {F}",
    ],
    "pal.wild": ["{his} friend {F} the {f.kind}", "a {f.kind} named {F}", "a {trait2} {f.kind} named {F}"],
    "palo.kid": [
        "{his} friend {F.o}",
        "{his} neighbor {F.o}",
        "a {f.kind} named {F.o}",
        "{his} [best|old] friend {F.o}",
    ],
    "palo.wild": [
        "{his} friend {F.o} the {f.kind}",
        "a {f.kind} named {F.o}",
        "a {trait2} {f.kind} named {F.o}",
    ],
    "thanks": [
        '"[Thank you|Thanks|Thank you so much], {f!}," said {H}[| with a smile|, smiling|, out of breath].',
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
    "what": [
        '"[Why are you so sad|What is the matter|What are you looking for|What is wrong|Why the long face], {h!}?" asked {F}.',
        '{F} saw [{h!.s} face|that {h!} was sad]. "[Tell me everything|Let me help you|Tell me what is wrong]," {f} said.',
    ],
    "bedtime": [
        "[that night|that evening|when night fell], {evening}.",
        "[later|at last|after supper] {evening}.",
        "soon {evening}, and [{h!} was tired|{M} called for supper|{h!} yawned].",
    ],
    "endo": [
        "@ends",
        "@ends",
        "@ends",
        "@ends",
        "@ends",
        "<@bedtime> [Back|Safe] in the {nest}, {h!} [put|laid] the {o!} [next to|beside] the {x!} and [thought of|smiled about|dreamed of] {f!.o}.",
    ],
    "ends": [
        "from [that day on|then on], whenever {h!} [saw|looked at|picked up|held] the {o!}, {he} [thought of|remembered] {f!.o}.",
        "<@bedtime> In the {nest}, {h!} told {M.o} about {f!.o} and the {o!}. <[Then {he} fell asleep|{M} smiled].>",
        "[Now|After that|Since then] {h!} and {f!} [often met|met every week|played every day], and the {oc} [always came along|was always there].",
        "[to this day|even now|still today], {h!} [keeps|has] the {oc} in the {nest}, and {f!} [still comes to see it|often comes to visit].",
        "[that was how|and so] {h!} and {f!} [became friends for life|came to share a secret], and the {o!} [had|got] a place of honor in the {nest}.",
    ],
    "endh": [
        "<@bedtime> [Back|Safe] in the {nest}, {h!} [told|talked to] {M.o} about {f!.o} [before going to sleep|until {he} fell asleep].",
        "[after that|later|ever since], {h!} still loved {hobby}, but now {f!} [came along|joined in|was always there too].",
        "[from then on|after that|from that day on], {h!} and {f!} were [the best of friends|always together], and every {weekday} [you could see them|they met for] {hobby}.",
        "<@bedtime> {h!} went home to the {nest}, and {f!} waved [for a long time|until it was dark].",
        "and if you pass the {nest} today, you may [see|find] {h!} and {f!} there, {hobby}.",
    ],
    "askhelp": [
        '@pal [saw it|came by|was watching|heard the cry]. "[Wait|Do not worry|Leave it to me], {h!}, ',
    ],
    "help.kid": [
        '@askhelp I have a {tool} [at home|in the shed]," said {F}. {f} [ran off|hurried off] and [soon|quickly] came back with the {tool}. '
        "{F} [held|moved|turned] it [carefully|this way and that], and [out|back] came the {o!}.",
        '{M} came [over|out]. "Ask {f!}," {m} said. "[There is|You will find] a {tool} in {f.s} shed." So {H} [ran|hurried] to @palo, '
        "and they [brought|carried] the {tool} [back|to the {p}]. {F} [hooked|caught] the {o!} with it [at once|on the third try].",
    ],
    "help.wild": [
        '@askhelp a {f.kind} can {able}," said {F}. {f} {rescued} and [soon|quickly] came back with the {o!}.',
        '"[I cannot do it|A {h.kind} cannot {able}]," {h} [thought|said]. "But {f!} can." {^}{h} ran to @palo. The {f.kind} {rescued} '
        "and [brought back|came out with] the {o!}.",
    ],
    "lessonhelp": [
        "{h} had learned that [asking for help is better than crying|a good friend is worth more than a {o}].",
        '"What one cannot do, two can," {M} [said|told {h!.o}] [that evening|later].',
        "so {h} learned to ask {f!.o} for help [sooner|right away].",
    ],
    "lessontruth": [
        "{h} never [lied to|hid anything from] {f!.o} again.",
        "{h} had learned that the truth [weighs less than a lie|is the best glue].",
        '"The truth is hard for a minute, {h!}, and a lie is hard all day," {M} [said|told {h.o}].',
        "and {h} felt [light|free] again, with nothing to hide from {f!.o}.",
    ],
    "lessonshare": [
        "{h} had learned that [sharing makes things bigger|joy grows when it is shared].",
        '"What you share comes back, {h!}," said {M}.',
        "from then on {h} shared [gladly|everything] with {f!.o}.",
        "so {h} and {f} learned to share.",
    ],
    "lessonfear": [
        "{h} had learned that [being brave means being afraid and going on|only those who are afraid can be brave|a brave heart may beat fast].",
        '"Brave is who shakes and goes on, {h!}," said {M}.',
        "{h} was still a bit afraid of {fear}, but now {he} knew what to do.",
    ],
    "lessongift": [
        "{h} learned that a present you work for [is the best|makes two people happy].",
        '"The best part of the {o!} is your work, {h!}," {M} said.',
        "{h} was prouder of the {o!} than if {he} had [bought|found] it.",
    ],
    "lessonsmall": [
        "to help someone small is a big thing.",
        "{h} learned that a small voice needs [the best ears|a good listener].",
        "[now|then] {h} was [happy|glad] too.",
    ],
    "lessoncook": [
        "{h} learned to [look twice|look before pouring].",
        '"A mistake is half of a recipe, {h!}," {M} said.',
        "after that {h} never mixed up {wrong} and {spice} again.",
    ],
    "lessonrain": [
        "{h} learned that a good friend [is better than|can do more than] good weather.",
        '"Sunshine is where your friends are," {M} told {h!.o}.',
        "and {h} was almost thankful for the rain.",
    ],
    "lessoncontest": [
        "{f} never bragged about the {contest} again.",
        "{h} had learned that a friend is the best prize.",
        '"You came last and won, {h!}," {M} said.',
    ],
    "lessonnoise": [
        "{h} learned that [most things are smaller by day|a scary sound is often a small thing].",
        '"Look first, {h!}, and then be afraid," {M} said.',
        "after that no {noise} could scare {h!.o}.",
    ],
    "lessonstranger": [
        "a good deed [comes back|is never lost].",
        '"Kindness goes around, {h!}, and comes home," {M} said.',
        "after that {h} and {f} often [helped|visited] the {k.kind} together.",
    ],
    "lessonbuild": [
        "{h} learned to [take {his} time|listen to good advice].",
        '"Slow work stands long, {h!}," {M} said.',
        "{h} had learned more from the first {building} than from the second.",
    ],
    "lessonnew": [
        "{h} learned that one hello can change a day.",
        '"Every friend was new once," {M} told {h!.o}.',
        "nobody whispered about {f!.o} any more.",
    ],
    "lessonlost": [
        "{h} promised never to go past the {p} alone again.",
        '"Next time look back before you follow a {lure}, {h!}," {M} said.',
        "{h} learned to look back at the way now and then.",
    ],
    "lessonbirthday": [
        "{h} learned that quiet friends may be busy friends.",
        '"We could never forget you, {h!}," {M} said.',
        "{h} was a little ashamed, but mostly happy.",
    ],
    "lessonwait": [
        "Good things need time",
        "What grows slowly grows well",
        "A seed cannot be hurried",
        "A {crop!} does not grow faster when you pull at it",
    ],
}

PLOTS: tuple[Plot, ...] = (
    # Lost: a treasure is gone, a friend asks the right question.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when {H} took the {o} [along to|to] the {p}. <@color> [Before lunch|On the way home|A little later|At noon], {h} [reached for it|
        wanted to {do}], but [it was gone|it was not there|found it gone]. <"[Oh no|Oh dear|Help]! My {o!} is [lost|gone]!" {he} [cried|wailed|said].>

        {H} [ran|hurried|rushed] back and looked {p1}. <[There was only {junk}|All {he} found was {junk}|Nothing but {junk} was there].> <Then {he} looked
        {p2}, [but the {o!} was not there|with no luck|and then {p3}].> <@sad>

        <Just then> @pal came [by|along|past]. @what "I have lost my {oc}," {h} [said|sobbed|answered]. "<[Think back|Let us think]," said {F}.
        ">Where were you [before|earlier], {h!}?" <{H} [thought hard|closed {his} eyes and thought].> "I was {qin}," {he} said.

        [So they|Together they|The two friends|Quickly they] [went|hurried|ran] to the {q}. <{F} looked {q1}, and {H} looked {q2}.> And there,
        {q3}, [lay|was] the {o!}! <"[Here it is|I see it], {h!}!" [called|shouted] {F}.> [@glad|@thanks]

        <[Since then|After that], {h!} [always put|never forgot to put] the {o!} back [in its place|where it belonged].> @endo
        """,
    ),
    # Stuck: in a high place, in the water, in a hole; help comes from a friend who can do what the hero cannot.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when {H} [played|was playing] {pin} with the {oc}. <@color> [Suddenly|All at once|But then] [a gust of wind|a strong wind|a lively breeze]
        [tore it away|carried it off|pulled it up|snatched it], and it got stuck {tree}.

        {H} [jumped|stretched|stood on tiptoe|climbed on a box], but {he} could not reach the {o!}. <{h} threw {junk} at it, but [missed|it did not
        move].> <"[Now I will never get my {o!} back|What shall I do|Come down, {o!}]," {h} [said sadly|sighed|begged].>

        @help <@glad> @thanks <"Would you like to {do} too, {f!}?" {h} asked. {F} [nodded|said yes|did not wait to
        be asked twice]. So they took turns, first {f!}, then {h!}.>

        <@lessonhelp> @endo
        """,
        where="T",
        gift="climb",
        able="climb [well|very high|anywhere|any tree]",
        rescued="[went|climbed] [up and up|to the very top|up without fear|higher and higher]",
        outdoors="yes",
    ),
    _plot(
        _BOTH,
        """
        @open @treasure

        @when {H} [carried|took|brought] the {oc} to the {p}. {h} [slipped|stumbled|tripped] [on a wet stone|over a root|on the grass|over {his} own feet],
        and the {o!} [fell|flew|rolled] into {water}. <[It floated away|Splash|It drifted off]!>

        {H} [reached out|leaned forward|stretched], but the {o!} was too far [out|away|off]. <{h} poked at it with {junk}, but it
        [only drifted on|would not come].> <"[Please come back|Do not float away|Oh, my {o!}]!" {h} [called|cried|begged].> <@sad>

        @help <@glad> @thanks <{H} [dried|shook] the {o!} and held it [tight|close].> <"I will [never|not] play so near {water} again," {he} said.>

        <@lessonhelp> @endo
        """,
        where="W",
        gift="swim",
        able="swim [well|like a fish|in any water|very far]",
        rescued="[dived|jumped|slid] into {water}, [swam out without fear|paddled hard|disappeared for a moment]",
        outdoors="yes",
    ),
    _plot(
        _BOTH,
        """
        @open @treasure

        @when {H} sat {pin}, {doing}. [Suddenly|Then|All at once] the {o!} slipped [away|out of {his} grip] and [rolled|fell|dropped]
        into {hole}.

        {H} [reached in|lay down and looked|bent down and felt around], but [the {o!} was too far down|it was too dark|there was no end to it]. <"I can see my {o!}, but I cannot get it,"
        {he} [sighed|said|groaned].> <{h} tried with {junk}, but [that was no use|in vain].> <@sad>

        @help <"[It is not even scratched|It is only a bit dusty|It is as good as before], {h!}," said {F}.> <@glad> @thanks

        <@lessonhelp> @endo
        """,
        where="H",
        gift="squeeze",
        able="squeeze [in anywhere|through any gap|into any hole]",
        rescued="[breathed out|pulled in {f.his} tummy|made {f.self} thin], [slipped inside|went in without fear]",
    ),
    # Broken: something borrowed breaks; the truth is hard, and then easy.
    _plot(
        _BOTH,
        """
        @open {h} [often|always] [played|met up] with @palo. {F} had a {oc}, and {h!} had a {xc}.

        @when {F} said, "[I must go for a while|I have to help {M.o}|I am called home]. [Will you look after my {o!}, {h!}?|Please take care of my {o!}, {h!}.|Can you keep my {o!} for me, {h!}?]" <"[Of course|I will|Yes]," said
        {H}.> <{h} could not wait to {do}.> But [{he} was not careful|{he} was too wild|{he} pulled too hard], and it {broke}.

        {H} was [scared|frightened|very still] and hid the {o!} {p1}. [When|As soon as] {F} came back, {f.he} asked, "Where is my
        {o!}, {h!}?" "[I do not know|Maybe the wind took it|A bird took it]," {h} [lied|said softly]. <{F} looked {p2} and {p3}, and [was very sad|began to cry].>

        <{H.s} [heart|tummy] felt heavy.> "{f!}, I [did not tell the truth|told a lie|lied to you]," {he} said [at last|then]. "I broke your {o!}. It {broke},
        and [I hid it|now it is] {p1}.< I am [so|very] sorry.>" <{F} was [quiet|silent] [for a while|for a moment|at first].> <"I am sad about [it|my {o!}]," {f} said. "But [you told me, {h!}|you were honest, {h!}]."> {^}{f} [nodded to|sat down beside|forgave] {h!.o}.

        [Together they|So the two of them|Then they|The next day they] [found|got|borrowed] {mender} and [fixed|repaired|mended] the {o!}. <"[It looks like new|Now it is even better]," said {F}.> <"And you can have my {x!} [for a week|until Sunday]," said {H}.>

        <@lessontruth> @endh
        """,
    ),
    # Quarrel: two pull at one thing.
    _plot(
        _BOTH,
        """
        @open [{M} gave {h.o} a {oc} one day|{h} got a {oc} from {M.o}|{M} came home with a {oc} for {h.o}]. {h} wanted to {do} [all day|from morning till night|and nothing else].

        @when @pal came [to play|over|by] with a {xc}. "[May I [try|hold|have] your {o!}, {h!}?" asked|Let me [try|hold|have] your {o!}, {h!}," said] {F}.
        "[No, it is mine|No, go away|Play with your {x!}]," said {H}. <"[You never share|That is not fair], {h!}," [cried|said] {F}.> {f} [grabbed|took hold of|snatched] the {o!}.

        <{h!} pulled, and {f!} pulled.> <[Snap|Crack|Oh no]!> [Then it happened: the|All at once the|And the] {o!} {broke}. <Now nobody could {do}.> {F} [cried|ran off|shouted], and
        {h!} [stamped {his} foot|was angry|threw {self} on the ground].

        {M} [heard the noise|saw it all] and came [out|over]. "[What is a {o} worth without friends|Is a {o} worth more than {f!}|Who is happy now], {h!}?" {m} asked.
        <{H} looked at the {o!} and [thought about it|was quiet].> {h} [went|walked] to {f!.o}. "[I am sorry, {f!}|Forgive me, {f!}|That was silly of me, {f!}]," {he} said. <"I am sorry [too|that I pulled], {h!}," said {F}.>

        {M} [brought|fetched|found] {mender}, and together they [mended|repaired|fixed] it. [Then|Now] they took turns: {f!} {did}, and then {h!} did. <It was [twice|much] more fun [than alone|that way].>

        <@lessonshare> @ends
        """,
    ),
    # Fear: a fear met with a friend, a trick and something to hold.
    _plot(
        _BOTH,
        """
        @open [There was only one thing wrong|But {he} had one secret|Only one thing made {h.o} shake]: {h} was afraid of {fear}.
        [When there was talk of|If anyone spoke of] {fear}, {h} [held|hugged] {his} {xc} and [hid|shivered].

        @when {H} went to the {p} with @palo. {F} had a {oc} and [went|ran|walked] ahead. [Suddenly|Then|All at once] {h} heard {f.him}
        call, "[My foot is stuck|I cannot get out|I am hurt], {h!}!" {^}{h} [ran|started] toward the voice, but [then stopped|stopped]. {scene}.

        <{H.s} [knees|legs] shook.> "I am afraid of {fear}, {f!}," {he} called. "<I know. >[Do this|Here is a trick|Try it my way], {h!}: {advice}," [said|called] {f!}.
        <[{H} took a deep breath|{H} swallowed hard].> <{h} did [it|what {f!} had said].> {h} {dared}[, and nothing bad happened|, and it was not so bad|]!

        <There [sat|lay] {f!} {p1}.> {H} [pulled|helped] {f!.o} [free|up]. <"You were afraid of {fear}, {h!}, and still you came," said
        {F}.> "[Take my {oc}|My {oc} is yours now|I give you my {oc}]," {f} [said|added|whispered]. <{h} [held|took] the {o!} and [blushed|smiled|grinned].>

        <@lessonfear> <{h} put the {o!} beside the {x}.> @endh <Nobody ever said again that {h!} was afraid of {fear}.>
        """,
        outdoors="yes",
    ),
    # Gift: a present is earned by work.
    _plot(
        _BOTH,
        """
        @open [It was almost {m.s} birthday|{M} had a birthday coming|Soon it would be {m.s} birthday], and {h} wanted [to find|to give {m.him}|to have] [something special|a fine present]. <@color>

        [Near|Not far from] the {p} {h!} met a {k.kind} who was {k.work}. Beside {k.him} [stood|lay] a {xc} and a {oc}. <"[How pretty|What a fine {o!}|{M} would love that {o!}]," {h} [said|thought aloud].> <"[How much is|What do you want for|What does it cost to have] the {o!}?" {h} asked.
        "More than you have," {k.said} {K}.>

        <@sad> "[Could I work for|May I earn|What can I do for] the {o}?" {h} asked. <{K} [thought|looked at {h.o}|nodded].> "[If you help with {chore}, then|Help me with {chore}, and] the {o!} is yours," {k} {k.said}. So {h!} {chored} [all day|until noon|for three days].

        [Then|Soon] @pal came by. <"[Come and play|Leave that], {h!}," said {F}. "Not until I am done," said {H}.> {f!} [saw how tired {h!} was|wanted to help] and [did half of the work|worked too|lent a hand]. [At last|In the end|When all was done] {K} [nodded|smiled]. "[Well done|Good work], {h!}. Here is your {oc}."

        [On the birthday|When the day came], {H} gave {M.o} the {o!}. <"[Did you buy this {o!}|Where did you get this {o!}], {h!}?" asked {M}. "I got it for {chore}, and {f!} helped me," said {H}.> {M} [hugged|kissed] {h!.o} and {did} [at once|right away].

        <@lessongift> @endh
        """,
    ),
    # Seed: waiting is hard.
    _plot(
        _BOTH,
        """
        @open [In spring|One spring day|When spring came], {M} gave {h.him} a {crop} seed. @pal got a {crop2} seed. <"[Plant them|Put them in the earth], {h!}, and wait," said {M}.>

        {H} planted {h.his} {crop!} seed {bed1}, and {F} planted the {crop2!} seed {bed2}. <[Every morning|Each day] they [ran|went] there with water.> [But nothing happened|But no leaf showed|There was only earth].

        [After a week|A week later|Soon] {h!} [lost patience|grew tired of waiting|could not wait any longer]. <"My {crop!} will never grow," {he} [grumbled|said].> {h} dug [up the {crop!}|in the earth {bed1}]. There was a [tiny|thin|pale|little] [root|white thread|sprout] on the seed! <"[Oh no|Oh dear], {f!}! I have hurt my {crop!}," {h} [cried|said].> <@sad>

        {F} [came and looked|came over|bent down]. "Put it back [quickly|gently|at once], {h!}," {f} said. <"{M} says that [every {crop}|a {crop}] [needs|wants] time."> {H} [covered the seed|put it back {bed1}] and [gave it water|patted the soil]. <[To keep from digging|While waiting], {h} went back to {hobby}, and {f!} [kept {h.o} company|helped].>

        [Weeks went by|The weeks passed|Then came summer|Time went by]. <[One morning|One day] {F} [shouted|called], "[Come quickly|Look], {h!}!"> {^}{bed1} stood [a tall|a strong|a fine|a big] {crop!} plant, and {bed2} stood [a {crop2!} plant|the {crop2!} plant|the {crop2!}]. <@glad> <"You see, {h!}?" said {M}. "@lessonwait.">

        [In the end|That autumn|When all was ripe], {H} gave {f!.o} [half|some|a share] of the {crop!}, and {f!} gave {h.o} [half|some|a share] of the {crop2!}. @endh
        """,
    ),
    # A lost young animal is brought home.
    _plot(
        _BOTH,
        """
        @open

        @when {H} was {hobby} {pin}. <@color> [Suddenly|Then|All at once] {h} heard a [small|thin|tiny|faint] [sound|voice]: "{call}, {call}!" {^}{p1} sat a {baby}, [all alone|wet and cold|shaking].
        <"[Where is your mother|Are you lost|Who are you], little one?" {h} asked. The {baby!} only said, "{call}!">

        {H} [gave it some {feed}|found some {feed} for it], and the {baby!} ate. <[It must have been hungry|Then it felt better].> <"I will take you home, [little {baby!}|{baby!}]," {h} [promised|said].> <[But where was home?|But {he} did not know the way.]>

        [On the path|On the way|At the corner] {h} met @palo. "[Is that a {baby2}|Do you have a {baby2} there], {h!}?" asked {F}. "No, it is a {baby!}[, {f!}|]," said {H}.  "{call}!" [went|said|cried] the {baby!}. "[It wants its mother|It needs a {mother}|It wants a {mother}]," said {F}. "[I saw one|There is one|Let us look] near {shelter}."

        <[First they came to|On the way they saw] a {mother2}. "[Is this yours|Have you lost a child]?" asked {H}. But the {mother2} had her {baby2} [beside|with] her.> [At|Near] {shelter} a {mother} was [calling|running about|looking around]. "{call}!" cried the {baby!}, and [ran|hurried] to her. <The {mother} [was overjoyed|nuzzled her {baby!}].>

        <"We did it, {f!}," said {H}.> <{h} was a little sad to see the {baby!} go.> "[You did it|It was you|You found it], {h!}," said {F}. <@lessonsmall> @endh <And [sometimes|at times], from {shelter}, [somebody|a voice] called, "{call}!">
        """,
        outdoors="yes",
    ),
    # Cooking: the wrong jar.
    _plot(
        _BOTH,
        """
        @open [{h} wanted to make {afood} for {M.o}|It was {m.s} birthday, and {h} wanted to make {afood}|{M} was ill, and {h} planned to make {afood}]. [{M} liked it|Everyone liked it|{h} liked it] [even|much] more than {food2}.

        [{H} asked @palo to help|{H} and @pal started early|@pal came to help]. <{F} [fetched the bowl|lit the stove|found two aprons|laid out the spoons], and {H} {stirred}.> "[Now the|It needs|Pass me the|Put in some] {spice}, {h!}," said {F}. {H} was thinking of {hobby}. [In went the|Into the bowl went the|Without looking, {he} took the] {wrong} [instead of|and not] the {spice}!

        [When it was done|Later|Soon] {F} [tried|tasted] [the {food!}|a spoonful of the {food!}]. "[Ugh|Oh dear|Yuck]! [{h!}, what is in this {dish}|What did you put in, {h!}]?" {f} [cried|coughed]. {H} looked at the jar. "[It says {wrong}|This is {wrong}|I put in {wrong}]," {he} [whispered|said]. <"I have spoiled the {food!}, {f!}."> <@sad>

        "[We have time|Do not cry|Never mind], {h!}," said {F}. <"We can [start again|make a new {dish}]."> [This time|Now] {H} read [each|every] label. <{f!} [checked|held] the {spice}, and {h!} {stirred}.> Soon the [whole|entire] {nest} smelled of {food!}.

        {M} [came in|sat down|arrived] and [took a bite|tasted it]. "[This is the best|What a lovely|Never have I had such a good] {food!}, {h!}," said {M}. <{H} and {F} looked at each other and [laughed|giggled].> <"It is our second one," said {H}, and {he} told {M.o} about the {wrong}.>

        <@lessoncook> @endh
        """,
    ),
    # Plans and rain.
    _plot(
        _BOTH,
        """
        @open [For days|All week|For a long time], {h} and @pal had planned a picnic {pin}. {H} would bring {afood}, and {F} would bring {afood2}.

        On {weekday} [morning|at dawn] {H} [looked out|woke up|opened the window]. [Rain|It poured|Water ran down the glass|It rained and rained]! <"[No picnic today|Our picnic {pin} is spoiled]," {h} said.> {h} [pushed away|put down|did not want to see] the {food!}. <@sad>

        <[Knock, knock|There was a knock at the door].> [There stood {f!}|In came {f!}|{f!} stood at the door], [dripping wet|wet from head to toe|wet but smiling], with the {food2!} under one arm. "[Why the long face, {h!}?" asked|Why so sad, {h!}?" asked|Cheer up, {h!}," said] {F}. <"We cannot go to the {p}, {f!}," said {H}.> "[The {p} must come to us|Let us play {p} here|We will make our own {p}|Then we need no {p}]," {f} [said|laughed|called].

        <They spread a [cloth|sheet|blanket] on the floor of the {nest}.> [A chair was the tree, and|A lamp was the moon, and|The rug was a lake, and|A green rug was the grass, and|They crawled under the table, and] {F} [made|drew|painted] a paper sun[, and {h!} hung it up|]. [Then|Happily|Together|So] they ate the {food!} and the {food2!}[, and {M} came too|]. <"[More|Some more] {food!}?" asked {H}. "[Yes, please|Gladly], {h!}," said {M}.>

        <[Afterward|After the meal] they spent hours {hobby}. [Nobody noticed|They did not see] that the rain had stopped.> "[This was the best picnic|It was better than {pin}|The {p} could not be nicer], {f!}," said {H}. <@lessonrain> @endh
        """,
        outdoors="yes",
    ),
    # Contest: the boaster, the practice, the good deed.
    _plot(
        _BOTH,
        """
        @open {h} heard of a {contest} {pin}. The prize was a {oc}. <"[I would love to {do}|That {o!} would be lovely|I want that {o!}]," {h} said[, and began to practice|].>

        @pal [laughed|sneered|grinned]. "You? I can {boast}," [bragged|boasted|said] {F}. <"The {o!} is as good as mine, {h!}. You can [keep|play with] your {xc}."> <@sad> But [every day|each morning|day after day] {h!} {practice}, while {f!} [slept late|lay in the sun|rested].

        [The day of the {contest} came|At last the {contest} began|Then came the {contest}]. {F} was [ahead|better|far ahead] [at first|from the start]. But [close to|just before] {goal} {f.he} [stumbled|slipped|fell]. "[Ow|Oh], my [foot|leg]!" {f} [cried|moaned]. <{H} could have [won|gone on] alone. The {o!} was so near!>

        {H} [stopped|turned around|ran back]. "[Lean on me|Take my arm|Hold on to me], {f!}," {he} said. Together they [reached|came to] {goal}, last of all. <[Everyone cheered|People clapped].> "[You can all {skill}|Many can {skill} well|Some {skill} better than others]," [said|called] the judge. "{^}[Still, the|But the] {o!} [is for {h!}|goes to {h!}], [for a kind heart|for helping {f!}]."

        <{F} looked [down|at the ground].> "I was [mean|rude|unfair] to you, {h!}," [said {F}|{f!} said]. <"[Can you|Will you] forgive me?"> "[Let us both {do}|We can share the {o!}|The {o!} is for both of us], {f!}," said {H}. <@lessoncontest> @endo
        """,
        outdoors="yes",
    ),
    # Not sharing food.
    _plot(
        _BOTH,
        """
        @open <{M} [often said|always said], "Share what you have, {h!}.">

        @when {M} gave {h.him} {afood}. {H} [took|carried] the {food!} to the {p} and sat down {p1}. <@color> @pal [came by|came along]. "[May I have a little of|Can I try|Will you share] your {food!}, {h!}?" asked {F}. "[No|Never|It is all mine]," said {H}, and ate [all of it|everything|every bit] alone. <{F} went away [sadly|hungry].>

        [The next day|A few days later|The week after], {h!} went out and forgot [to take food|{his} lunch]. <{h} was {hobby} when {his} stomach [growled|grumbled].> {F} was sitting {p2} with {afood2}. {H} [did not dare to ask|remembered the {food!}|thought of the {food!} and blushed].

        "[You look hungry|You must be hungry|You look pale], {h!}," said {F}. "[Come|Sit down] and have some [of my|] {food2!}." <{H} could not believe it.> <"[I gave you no|You got none of my] {food!}, {f!}," {he} [said|whispered]. "[I know, {h!}|I remember, {h!}]," said {F}. "[It was not nice|So I know what hunger is|Take the bigger half|Eat, there is enough].">

        <The {food2!} was the best that {h!} had ever [eaten|tasted].> @thanks <"[Tomorrow|Next time] I will bring {afood}, [and you shall have half|and half is yours]," {h} said.> [And so it was: the|{h} kept {his} word: the] next [time|day|{weekday}], {F} got [the biggest piece|a big share|half] of the {food!}.

        <@lessonshare> @endh
        """,
    ),
    # A strange noise in the night.
    _plot(
        _KID,
        """
        @open @treasure

        [One night|Late one night|In the middle of the night], {h!} [woke up|sat up in bed|could not sleep]. <{noise}!> [Something|It] was {noise} {nook}. <"[Who is there|What can that be]?" {h} whispered. Nobody answered.> {h} [hugged|held|grabbed] the {o!} and [hid under the covers|did not move] till dawn.

        <[In the morning|At breakfast], {H} told {M.o} about the {noise}. "[It was a dream|You dreamed it], {h!}," said {M}. But> {h} told @palo about the {noise} {nook}. "[Let us find out|We must look|We will see], {h!}," said {F}. "Bring your {o!}, and [leave the {x!} here|forget the {x!}|let the {x!} sleep]."

        [That night|When it was dark|At midnight], {h!} and {f!} [waited|sat still|listened]. <{noise}!> [There it was again|Then it came again|Soon they heard it]. <{H} [held {his} breath|shook].> "[We go together|Stay close|Do not leave me], {f!}," {he} [said|whispered]. [Step by step|Slowly|On tiptoe] they [crept nearer|crept closer|went on] and looked {nook}. It was {source}, {state}! <"[Is that all?|So that was it!]" laughed {F}.> {H} [bent down and|carefully|quickly] {deed}, and the {noise} stopped.

        <[{H} and {F}|The two friends] laughed so loudly that {M} came. "So you did not dream, {h!}," said {M}. "It was {source}."> <@lessonnoise> @endo
        """,
    ),
    # A stranger is helped, and helps.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when {H} was on the way to @palo with the {o!}. {pin} {h} saw a [tired|{trait2}] {k.kind} who was {k.work}. <{K} sighed.> <"[So much to do|My back hurts|All this work], and [nobody to help|so little time|no end to it]," {k.said} {K}.>

        <{H} [stopped|stood still]. {F} was waiting, but [{he} could not just walk on|the {k.kind} looked so tired].> {h} put the {o!} {p1} and helped with {chore}. <It took [a long time|all morning].> "[Bless you|You are kind|Well done], {h!}," {k.said} {K}, and gave {h.him} {k.gift}.

        <[When|As soon as] {H} got to {f!.o}, {f} was [cross|angry].> "[You are late, {h!}," said|I waited and waited, {h!}," said|Where were you, {h!}?" asked] {F}. "I helped the {k.kind}, and I got {k.gift}," said {H}. "And where is [the|your] {o!}?" asked {F}. {h} turned [pale|white|red]. The {o!} was still {p1}[, far away|]!

        <They [ran back|ran quickly|ran the whole way|raced back], but {p1} there was nothing.> <@sad> Then {K} [came out of the shadows|stepped around the corner|came running|appeared]. "[Are you looking for this {o}|Is this {o} yours|Did you forget your {o}], {h!}?" {k} {k.said}. "You helped me with {chore}, so I [watched over|kept|looked after] it." <@glad>

        <"Now I see why you stopped, {h!}," said {F}, and [was not cross any more|smiled].> <@lessonstranger> @endo
        """,
        outdoors="yes",
    ),
    # Building: the weak place.
    _plot(
        _BOTH,
        """
        @open {h} had a [plan|dream|wish]: {he} wanted to build a {building} out of {stuff}.

        [{H} asked @palo to help|@pal wanted to help], and they [met|started|set to work] {site}. <@color> "[First {weak}|We must think of {weak}|Watch out for {weak}], {h!}," said {F}. "[That takes too long|No time for {weak}|Faster], {f!}," said {H}. <[By noon|Soon] the {building} was [done|ready].> {h} [put|laid] {his} {xc} and {his} {oc} [there|beside it|down there].

        [Then it happened|But then came trouble|It did not last|What a shock]: {fell}. <It had [begun|started] with {weak}.> <[The {building} was gone|Nothing was left of the {building}].> {H} [pulled|dug] the {o!} and the {x!} out of the {stuff}. <"[All that work, {f!}|It was all for nothing, {f!}]," {h} [cried|said|sighed].>

        <{F} sat down beside {h!.o}.> "{fell}, because we [forgot|did not mind|were careless with] {weak}[, {h!}|]," {f!} said. <"[Shall we try again|Once more], {h!}?"> {H} wiped {his} face. "[You were right|I should have listened to you|This time I will listen], {f!}." So they built [it|the {building}] again, {better}. <It took [two days|until evening|three days].>

        [The next day|That night|In the end] [they waited|they watched|they looked], and the new {building} stood. <@glad> <{M} came to see it and [clapped|was amazed].> {h} put the {o!} [back|on top|next to it], and {f!} [hung up|painted] a sign: "[{h!} and {f!}|Built by {f!} and {h!}]."

        <@lessonbuild> @endh
        """,
    ),
    # Someone new.
    _plot(
        _BOTH,
        """
        @open @treasure

        [One day|One {weekday}|In autumn|Last summer], someone new [moved in|came to live] [next door|nearby|across the way]: a {trait2} {f.kind} named {F}. {F} sat {p1} [all alone|by {f.self}|without a word] and [looked at the ground|talked to nobody|drew lines in the dust|kicked at pebbles]. <The others whispered and [kept away|laughed].>

        {H} watched {f!.o} [for a while|from afar]. <"[I wonder why {f!} is so quiet|Maybe {f!} does not like us]," {h} said to {M.o}.> "Maybe {f!} [is shy|misses home|is sad], {h!}," said {M}. "[Take your {o!}|Bring your {o!}|Show {f.him} your {o!}] and say hello."

        <[{H} was shy too|It was not easy].> {h} took the {oc} and [went|walked] over. "[Hello|Good day], I am {H}," {he} said. "[Do you want to {do}|I like to {do}. Do you]?" <{F} looked up.> "I had a {o} once, {h!}," {f!} said [softly|quietly]. "Now I have [nothing to play with|nothing at all|no toys left|only stones and sticks]." "[Then we will share|You may use mine], {f!}," said {H}.

        {F} [smiled|laughed] for the first time. <[Soon|Before long] {f!} {did}, and {h!} [tried|played with] the {x!}.> <[Then|Later] they spent the day {hobby} until {M} called.> "[Come back tomorrow|See you tomorrow|Come again], {f!}," said {H}. "[I will|Yes], {h!}," said {F}.

        <@lessonnew> @endo
        """,
    ),
    # The way home.
    _plot(
        _BOTH,
        """
        @open <"Never go past the {p}, {h!}," {M} [often said|always said].> <@color>

        @when {H} saw a {lure}. <It [flew|danced|drifted] this way and that.> {h} followed the {lure} past the {p} and [on and on|far away]. <[When {he} looked around|At last], nothing looked [familiar|like home].> {h} had only a {xc} and a {oc} with {h.him}.

        "[I am lost|Where am I]," {h} [said|whispered]. {sounds}. <{h} [held|hugged] the {o!} and tried [one path, but it|a path that] ended {q1}.> <{h} tried another, and it ended {q2}.> <@sad>

        <Then> @pal [came along|appeared]. "[You are far from home, {h!}," said|What are you doing here, {h!}?" asked|Are you lost, {h!}?" asked] {F}. <"I followed a {lure}," said {H}.> "I live in a {nest}, [but I cannot see it|and I cannot find it|but I lost my way], {f!}." "[I know that {nest}|I have seen it]," said {F}. "[We go past the {p}|First to the {p}], and [then it is near|then left|then straight on]. [Let us {do} on the way|Show me your {o!} on the way]."

        They {ways}. [Soon|At last] {h!} saw the {p}, and then the {nest}. <{M} [was at the door|came running]. "{h!}! [Where have you been?|I was so worried!]"> "I followed a {lure}, and {f!} [brought me home|knew the way]," said {H}. {M} [thanked|hugged] {f!.o} and gave {f.him} {afood}.

        <@lessonlost> <When {h} saw a {lure} again, {he} only waved.> {h!} gave {f!.o} the {o!} [to remember that day|as a thank-you|as a present]. @endh
        """,
        outdoors="yes",
    ),
    # A forgotten birthday that was not forgotten.
    _plot(
        _BOTH,
        """
        @open [Tomorrow was|It was|{weekday} was|Soon it was] {h.s} birthday. {h} [hoped|wished] for a {oc}, because {he} wanted to {do}.

        But [in the morning|at breakfast|that day] nobody [said a word|said anything|seemed to know]. {M} was busy with {chore}. <"[Not now|Later], {h!}," said {M}.> So {h!} [went|walked|ran] to @palo. "[I have no time|Not now|Come back later], {h!}," said {F}, and [shut|closed] the door[ quickly|]. <{h} thought {he} heard [giggling|whispers].>

        {H} [went|walked] to the {p} alone and sat {p1}. <@color> <[Not even {hobby} was fun|{hobby} was no fun today].> "[They have forgotten me|Nobody remembers me]," {h} [said|thought]. "[Not even {f!} knows|Even {f!} forgot|And {f!} is too busy]!" <{^}@sad> <Then a {k.kind} came by. "[A sad face on such a day|Why so sad], {h!}?" {k.said} {K}. "Go home. [You will see|Things will look better there].">

        [Slowly|At last|In the evening] {h!} went home. The {nest} was dark. <{H} opened the door.> "[Surprise|Happy birthday], {h!}!" There stood {M} and {f!}, [and on the table was|and they held up|and before them was] {afood} with [candles|a big candle] on it. <"[Did you think we forgot|You thought we forgot], {h!}?" laughed {F}. "I [was busy with|had to hide] the {food!}.">

        From {M.o} there was a {xc}, and from {f!.o} [there was a box|there was a parcel|came a bag]. [In it was|Inside was|{h} opened it and found] a {oc}! <@glad> <"How did you know, {f!}?" asked {H}. "You talk about a {o} all day," said {F}.> They [ate|shared|tasted] the {food!} and {did}.

        <@lessonbirthday> @endo
        """,
        sweet="yes",
    ),
    # Ill in bed: a friend is cheered up through the window.
    _plot(
        _BOTH,
        """
        @open [Every day|Every {weekday}|Most of the time] {he} [met|played with] @palo.

        But [today|this morning|on {weekday}] {f!} did not come. "{F} [has a fever|has a cold|is ill in bed], {h!}," said {M}. "[You cannot go in|You must stay outside]." @sad {h} looked at {his} {xc} and then at {his} {oc}, and [had an idea|knew what to do|jumped up].

        {H} [took|carried] the {o!} to {f!.s} [window|garden] and [knocked|whistled|called]. <{F} looked [pale|tired].> "[Watch this|Look here|This is for you], {f!}!" {h} [called|said]. Then {he} {did}[, again and again|, up and down the path|], until {f!} [laughed|smiled|sat up]. <"[Once more|Again], {h!}!" [called|cried] {F}.>

        <[Every day|Each afternoon|For a whole week] {h!} came back with the {o!}, and {M} [cooked|sent] {afood}. {F} [ate|tasted] the {food!} and [slept well|grew stronger].> <"Next time I would rather have {food2}," [joked|said] {F}.> [At last|A week later|In the end] {f!} was [well|up] again.

        [Then|In winter|Soon after] it was {h!} who [had a cold|lay in bed|had a fever]. [Tap, tap|Knock, knock]! [There stood {f!}|{f!} was at the window] with {afood2}. "[Now it is my turn|I have not forgotten], {h!}," said {F}. <"Where is your {o!}?" {f} asked. "I want to {do} for you."> @glad

        <@lessonshare> @endo
        """,
    ),
    # An errand: something to deliver, and something to do on the way.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when {M} [called|came to] {h!.o}. "Please take {afood} to the {k.kind} {pin}, {h!}," said {M}. <"[Do not stop on the way|Go straight there|And be careful]."> {H} [took|packed] the {food!} in one arm and the {o!} in the other. <@color>

        [Halfway|On the path|Near the {q}] {h} met @palo. "[Stay a while|Come and play], {h!}," said {F}. "Let us {do}." {H} put the {food!} down {q1}, and they [played|laughed] [for an hour|until noon|a long time]. [When {h!} looked up,|But meanwhile] {thieves} had eaten [nearly all of|half of|most of] the {food!}!

        @sad <"[What will {M} say|What shall I tell the {k.kind}]?" {h} [asked|cried].> "[It is my fault too|I kept you here], {h!}," said {F}. "We have {food2} at home. [Take that|Let us bring that|You can have it]." [So they|The two friends] [went|hurried] to the {p} together. "I had {afood} for you," {H} told {K.o}. "{thieves} ate it [while I played|{qin}]. This is {food2} [instead|from {f!}]."

        {K} [laughed|smiled|nodded]. "[I like|I even prefer] {food2!}, {h!}," {k} {k.said}. "And I like the truth." <{K} gave {h!.o} {k.gift}, and {h!} gave it to {f!.o}.>

        <@lessontruth> [@endh|@endo]
        """,
        outdoors="yes",
    ),
    # A swap that is regretted.
    _plot(
        _BOTH,
        """
        @open {h} had a {oc}, and @pal had a {xc}. <@color>

        @when {H} [saw|watched] {f!.o} with the {x!}. [It looked like so much fun|How lovely it was|It was much nicer than the {o!}]! "[Shall we swap|Shall we trade|Will you swap with me], {f!}?" {h} said. "My {o!} for your {x!}?" <"[Forever|For good], {h!}?" asked {F}. "[Forever|For good|Yes, yes]," said {H}.>

        [At first|That day|For a day] {h!} was [happy|pleased] with the {x!}. But [soon|at night|the next morning] {he} [missed|thought of] the {o!}. {h} used to {do}, [and now {he} could not|and now {f!} {did}]. <Even {hobby} was no fun without it.> @sad <"[A swap is a swap|You made a promise], {h!}," said {M}.>

        {H} [went|walked] to the {p}. {F} sat {p1} with the {o!} and looked [sad|glum]. "[What is wrong|Do you not like the {o!}|Why so glum], {f!}?" asked {H}. "[I miss my {x!}|I cannot sleep without my {x!}]," said {F}. "[But I was afraid to say so|But we said forever]." {H} [began to laugh|burst out laughing]. "And I miss my {o!}, {f!}! [Let us swap back|Here is your {x!}]."

        [Then|At once] {h!} {did}, and {f!} [hugged|held] the {x!}. <"[You may borrow my {o!}|We can lend them], {f!}," said {H}. "[You may borrow my {x!}|Any time], {h!}," said {F}.> <{h} [learned|saw] that [your own things know you best|new is not always better|it is easy to forget what you have|a {o} can be missed like a friend].> @ends
        """,
    ),
    # Hide and seek: someone cannot be found.
    _plot(
        _BOTH,
        """
        @open @treasure

        @when {h!} and @pal played hide and seek {pin}. {H} [closed {his} eyes|turned around] and counted to [ten|twenty|fifty|one hundred]. <@color> "[Here I come|Ready or not], {f!}!" {h} [called|shouted]. {h} looked {p1}. [Nobody|Only {junk}]! <{h} looked {p2}. [Nobody there|Not a trace]!>

        [Soon|At last|Before long] {evening}. "[You win|Come out], {f!}!" {h} [called|shouted]. [Nobody answered|There was no answer|All was still]. <[Now {h!} was worried|{h!} grew afraid].> <"[What if {f!} is lost|What if {f!} fell into {hole}]?" {h} [thought|said].> @sad

        [Then {he} had an idea|There was one thing left to try]. {F} loved the {oc}[ more than anything| even more than the {xc}|]. {H} [ran home|ran] and [came back with|fetched] the {o!} and [called|shouted], "{f!}, do you want to {do}?" {^}[Something moved|There was a yawn|A head came up] {p3}. It was {f!}, [half asleep|with straw on {f.his} head]! <"[I fell asleep|I must have slept]," said {F}. "Did you say {o}?">

        @glad <"I was so worried, {f!}," said {H}. "[Next time snore louder|Next time do not hide so well]."> Then {f!} {did}[, and {h!} watched|, and after that {h!} did].

        <{h} [learned|knew now] that [finding is the best part of hiding|a friend is worth looking for|{f!} was a champion at hiding].> @endo
        """,
        outdoors="yes",
    ),
    # Found: a thing that belongs to somebody.
    _plot(
        _BOTH,
        """
        @open {h} [always wanted|had long wished for] a {o}[, but had only a {xc}|; {he} had only a {xc}].

        @when {h!} was {pin} and saw something {p1}. It was a {oc}! <@color> "[Now it is mine|Finders keepers|What luck]," {h} [said|whispered]. <{h} [looked|turned] around. [Nobody was there|There was no one near].> So {h!} took the {o!} home to the {nest} and {did}.

        [The next day|On {weekday}|Later] @pal sat {p1}, [crying|with red eyes]. "[What is the matter|Why do you cry], {f!}?" asked {H}. "I left my {o!} here, and now it is gone," said {F}. "[It was a present|I saved for it all year|I had no other {o}]." {H} [blushed|felt hot]. <"[How sad|That is bad]," {he} said and [went|walked] home.>

        That night {h} could not sleep. [The {o!} lay there|The {o!} seemed to look at {him}]. <{h} asked {M.o}, "[May I keep|Is it right to keep] [what I find|a {o} that I found|a lost {o}]?" "[Ask|First ask|Better ask] the one who lost [it|the {o}], {h!}," said {M}.> [Early in the morning|At sunrise] {h!} [ran|went] to {f!.o}. "[Here is your {o!}|This is your {o!}], {f!}," {he} said. "I [kept it|took it|wanted to keep it][. I am sorry|, and I am sorry|, and it was wrong]."

        <{F} [held|hugged] the {o!} [tight|for a long time].> "[You brought it back|You are honest], {h!}," {f} said. "[Come any time to {do}|We can {do} together]." <And {H} gave {f!.o} the {x!} [as well|on top].>

        <@lessontruth> @endh
        """,
        outdoors="yes",
    ),
)

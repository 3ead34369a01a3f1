"""What the built-in stories are about: names, animals, things, places, food, and how they go together.

Notable: facts come in rows (a kite is flown and tears; an otter swims, lives in a den and has paws), so that what a
story says of a thing early decides what it can say late. `choose` fills a slot the first time a story needs it;
`character` makes a hero, a friend, a grown-up or a stranger. Built in chapter 1.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split(",") if part.strip())


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines())


BOYS = _words("""Aaron, Adam, Albert, Alfie, Andy, Anton, Arlo, Arthur, Ben, Boris, Bruno, Caleb, Carl, Colin, Dan, David,
Dexter, Diego, Edgar, Eli, Emil, Eric, Ethan, Felix, Finn, Fred, George, Gus, Hans, Harry, Hugo, Ian, Ivan, Jack,
Jacob, Jasper, Jim, Joel, Jonas, Josh, Karim, Kevin, Leo, Liam, Louis, Lucas, Marco, Martin, Mateo, Milo, Nathan, Ned,
Nils, Noah, Oliver, Omar, Oscar, Owen, Paul, Pedro, Peter, Philip, Ravi, Robert, Ruben, Sam, Simon, Stefan, Theo, Tim,
Toby, Tom, Victor, Walter, Yusuf""")
GIRLS = _words("""Abby, Ada, Alice, Amara, Amy, Anna, Astrid, Beth, Bella, Carla, Carmen, Cleo, Clara, Daisy, Dora, Edith,
Eliza, Ella, Elsa, Emma, Erin, Esther, Eva, Fatima, Fiona, Freya, Gina, Grace, Greta, Hannah, Heidi, Helen, Ida, Ines,
Iris, Jane, Jenny, Judy, Julia, Kate, Kira, Lara, Laura, Leila, Lena, Lily, Lola, Lucy, Mara, Maria, Martha, Maya, Mia,
Mina, Molly, Nadia, Nell, Nina, Nora, Olga, Olive, Paula, Penny, Polly, Priya, Rita, Rosie, Ruby, Sally, Sara, Sofia,
Stella, Susan, Tara, Tess, Vera, Wendy, Yara, Zoe""")
HE_ANIMALS = _words("""Acorn, Bandit, Barley, Basil, Biscuit, Boulder, Bramble, Buster, Chestnut, Clover, Comet, Dusty,
Flint, Fuzz, Ginger, Gizmo, Jumper, Max, Moss, Mud, Nibbles, Nutmeg, Oakley, Patch, Pepper, Pickle, Pip, Pogo, Reed,
Ripple, Rocky, Rusty, Scout, Smoky, Sprout, Thistle, Tumble, Twig, Waffle, Whisker""")
SHE_ANIMALS = _words("""Amber, Apple, Berry, Birdie, Blossom, Bluebell, Butter, Cherry, Cinnamon, Cocoa, Coral,
Dahlia, Dewdrop, Fern, Flora, Hazel, Heather, Holly, Honey, Ivy, Jewel, Juniper, Lavender, Maple, Marigold, Misty, Muffin,
Myrtle, Pearl, Petal, Petunia, Pansy, Plum, Poppy, Primrose, Sage, Snowdrop, Starling, Sunny, Tansy, Tulip, Velvet, Violet,
Willow""")
AUNTS = _words("""Mom, Mom, Mom, Mom, Grandma, Grandma, Grandma, Aunt Agnes, Aunt Bea, Aunt Carol, Aunt Dolly, Aunt Erica,
Aunt June, Aunt Linda, Aunt Rosa, Aunt Ruth, Aunt Vicky""")
UNCLES = _words("""Dad, Dad, Dad, Dad, Grandpa, Grandpa, Grandpa, Uncle Abe, Uncle Bill, Uncle Frank, Uncle Henry, Uncle Joe,
Uncle Luke, Uncle Ned, Uncle Pablo, Uncle Ralph, Uncle Ted""")

# kind | home | how it goes | gift: what it is good at
ANIMALS = _rows("""
    rabbit | burrow under the hedge | hopped | dig
    hare | nest in the tall grass | bounded | dig
    fox | den behind the ferns | trotted | dig
    bear | cave on the hillside | plodded | reach
    mouse | nest under the roots | scurried | squeeze
    squirrel | hollow in the old oak | scampered | climb
    chipmunk | hole in the stone wall | darted | climb
    hedgehog | bed of dry leaves | shuffled | squeeze
    badger | sett beneath the hill | lumbered | dig
    otter | den on the riverbank | bounced | swim
    beaver | lodge by the dam | waddled | swim
    mole | tunnel under the meadow | crept | dig
    raccoon | hollow log | padded | climb
    skunk | nest under the porch | ambled | dig
    frog | house among the reeds | leaped | swim
    turtle | home in the pond | crawled | swim
    kitten | basket in the hayloft | pranced | climb
    puppy | kennel beside the barn | bounded | dig
    possum | nest in the willow | wobbled | climb
    porcupine | hollow under the pine | rambled | climb
    weasel | gap in the rocks | slipped | squeeze
    newt | house under the bank | wriggled | swim
    shrew | nest in the moss | dashed | squeeze
    wolf cub | den below the cliff | loped | reach
""")

# kind | speaks | is busy with | gives
HELPERS_KID = _rows("""
    baker | said | kneading dough | a warm roll
    farmer | said | feeding the hens | a fresh egg
    gardener | said | cutting the roses | a yellow rose
    fisherman | said | mending a net | a silver fishhook
    mail carrier | said | sorting letters | a pretty stamp
    librarian | whispered | stacking books | a picture book
    shopkeeper | said | sweeping the floor | a peppermint stick
    painter | said | mixing colors | a pot of paint
    carpenter | said | sawing planks | a wooden block
    sailor | boomed | coiling a rope | a knotted rope
    shepherd | said | counting sheep | a ball of wool
    beekeeper | said | checking the hives | a jar of honey
    bus driver | said | wiping the windows | a shiny ticket
    tailor | said | sewing a coat | a spool of thread
    clockmaker | murmured | winding a clock | a brass wheel
    miller | said | filling sacks | a bag of flour
    blacksmith | boomed | hammering iron | an iron nail
    cook | said | stirring a pot | a slice of toast
    potter | said | shaping a bowl | a lump of clay
    florist | said | tying bouquets | a bunch of tulips
    nurse | said | rolling bandages | a soft bandage
    firefighter | said | washing the engine | a tin badge
    grocer | said | weighing apples | a crisp apple
    milkman | said | loading bottles | a bottle of milk
    cobbler | said | fixing boots | a strip of leather
    toymaker | chuckled | carving a duck | a little wheel
""")
HELPERS_WILD = _rows("""
    owl | hooted | smoothing ruffled feathers | a soft feather
    crow | cawed | building a nest | a bent twig
    heron | croaked | watching the water | a smooth reed
    toad | croaked | resting on a stone | a round pebble
    goose | honked | nibbling grass | a white feather
    woodpecker | chirped | tapping on a trunk | a chip of bark
    robin | chirped | pulling up worms | a red berry
    magpie | chattered | counting shiny things | a glass bead
    goat | bleated | chewing thistles | a tuft of wool
    donkey | brayed | carrying hay | a bundle of hay
    cricket | chirped | tuning a fiddle | a blade of grass
    deer | murmured | drinking from a brook | a fallen leaf
    swan | whistled | smoothing the water weeds | a water lily
    pigeon | cooed | pecking at seeds | a handful of seeds
    snail | mumbled | climbing a stalk | an empty shell
    duck | quacked | splashing about | a bit of duckweed
    sheep | bleated | munching clover | a lock of wool
    rooster | crowed | scratching the ground | a grain of corn
    lizard | hissed | lying in the sun | a warm stone
    bat | squeaked | hanging from a branch | a wild fig
    bee | buzzed | gathering nectar | a drop of honey
    stork | clattered | standing on one leg | a long straw
""")

_COLORS = "red, blue, green, yellow, purple, orange, white, pink"
_LOOKS = {
    "c": _words(_COLORS),
    "w": _words("wooden, painted, carved, old, polished"),
    "s": _words("soft, woolly, striped, checkered, patched, fluffy"),
    "m": _words("silver, golden, shiny, copper, tiny"),
    "p": _words("paper, spotted, striped, bright, crumpled"),
    "n": _words("little, smooth, brown, gray, pretty, speckled"),
}
# thing | looks | to do with it | did | doing | where it may go: T tree, W water, H hole | how it breaks | what mends it
THINGS = _rows("""
    kite | c | fly it in the wind | flew it in the wind | flying it | TW | tore down the middle | some tape
    ball | c | bounce it on the path | bounced it on the path | bouncing it | TWH | split at the seam | a needle and thread
    drum | w | beat it with two sticks | beat it with two sticks | beating it | - | got a hole in its skin | a patch
    sailboat | w | sail it in a tub | sailed it in a tub | sailing it | W | lost its mast | some glue
    doll | s | dress it in tiny clothes | dressed it in tiny clothes | dressing it | TWH | lost an arm | a needle and thread
    truck | c | fill it with sand | filled it with sand | filling it | WH | lost a wheel | a screwdriver
    train | w | push it over bridges | pushed it over bridges | pushing it | H | snapped in two | some glue
    hat | s | wear it at play | wore it at play | wearing it | TW | ripped along the brim | a needle and thread
    scarf | s | wrap it around twice | wrapped it around twice | wrapping it around | TW | came apart | some yarn
    umbrella | c | spin it in the rain | spun it in the rain | spinning it | TW | bent in half | some wire
    lantern | m | light it at dusk | lit it at dusk | lighting it | H | cracked on one side | some glue
    whistle | m | blow it loudly | blew it loudly | blowing it | WH | broke at the tip | some glue
    flute | w | play tunes on it | played tunes on it | playing it | WH | split at the end | some string
    bell | m | ring it at noon | rang it at noon | ringing it | WH | lost its clapper | some wire
    book | p | read it aloud | read it aloud | reading it | H | lost its cover | some tape
    puzzle | p | lay out its pieces | laid out its pieces | solving it | H | came apart | some glue
    balloon | c | let it float on a string | let it float on a string | floating it | TW | lost its string | some string
    wagon | c | pull it up the lane | pulled it up the lane | pulling it | WH | lost a wheel | a hammer
    bucket | c | carry water in it | carried water in it | filling it | WH | broke at the handle | some wire
    shovel | w | dig with it | dug with it | digging with it | WH | snapped at the handle | a nail
    basket | n | gather flowers in it | gathered flowers in it | filling it | TW | came undone | some straw
    blanket | s | sit under it | sat under it | sitting under it | TW | ripped at the edge | a needle and thread
    crown | m | rule the yard in it | ruled the yard in it | wearing it | TWH | bent out of shape | a hammer
    cape | s | whirl around in it | whirled around in it | whirling in it | TW | ripped at the hem | a needle and thread
    mask | p | make faces behind it | made faces behind it | hiding behind it | TW | tore at the nose | some tape
    paintbrush | w | paint clouds with it | painted clouds with it | painting with it | WH | lost its bristles | some string
    notebook | c | write secrets in it | wrote secrets in it | writing in it | W | lost its pages | some tape
    marble | m | roll it down the steps | rolled it down the steps | rolling it | H | chipped on the side | some glue
    hoop | c | roll it along the lane | rolled it along the lane | rolling it | TW | bent out of shape | some wire
    jump rope | c | skip with it | skipped with it | skipping with it | TW | frayed in the middle | some tape
    robot | m | make it march | made it march | winding it up | WH | lost a screw | a screwdriver
    puppet | s | make it dance | made it dance | moving it | TW | lost its strings | some string
    music box | w | wind it up at night | wound it up at night | winding it up | - | stopped playing | a screwdriver
    mirror | m | catch sunbeams with it | caught sunbeams with it | tilting it | H | cracked in the corner | some glue
    magnet | n | pick up pins with it | picked up pins with it | testing it | WH | broke in two | some glue
    compass | m | find north with it | found north with it | reading it | WH | lost its needle | a screwdriver
    map | p | plan trips with it | planned trips with it | studying it | TW | tore down the middle | some tape
    telescope | m | look at the moon through it | looked at the moon through it | looking through it | H | came apart | a screwdriver
    clock | w | listen to it tick | listened to it tick | hearing it tick | - | stopped ticking | a screwdriver
    key | m | pretend it opens a castle | pretended it opened a castle | turning it | WH | bent out of shape | a hammer
    coin | m | flip it in the air | flipped it in the air | flipping it | WH | lost its shine | a cloth
    ring | m | watch it sparkle | watched it sparkle | turning it | WH | bent out of shape | a hammer
    necklace | m | wear it to parties | wore it to parties | wearing it | TWH | came undone | some string
    button | n | spin it on a thread | spun it on a thread | spinning it | H | split in half | some glue
    ribbon | c | twirl it in circles | twirled it in circles | twirling it | TW | ripped in two | a needle and thread
    feather | n | tickle noses with it | tickled noses with it | waving it | TW | bent in half | some tape
    shell | n | hear the sea in it | heard the sea in it | listening to it | WH | chipped on the side | some glue
    pinwheel | p | run with it in the breeze | ran with it in the breeze | blowing on it | TW | lost a wing | a pin
    teapot | m | pour make-believe tea from it | poured make-believe tea from it | pouring from it | - | lost its lid | some glue
    spoon | w | dig tiny wells with it | dug tiny wells with it | digging with it | WH | snapped at the handle | some glue
    pillow | s | build forts with it | built forts with it | plumping it | TW | burst at the seam | a needle and thread
    backpack | c | pack snacks in it | packed snacks in it | packing it | TW | ripped at the strap | a needle and thread
    sled | w | ride it down the slope | rode it down the slope | riding it | WH | cracked underneath | a nail
    scooter | c | ride it round the yard | rode it round the yard | riding it | W | lost a wheel | a wrench
    skateboard | c | roll down the lane on it | rolled down the lane on it | riding it | W | cracked underneath | a wrench
    bow | w | shoot straws with it | shot straws with it | pulling it | TW | lost its string | some string
    camera | n | take pictures with it | took pictures with it | holding it | H | got stuck | a screwdriver
    flag | c | wave it from the gate | waved it from the gate | waving it | TW | ripped along the edge | a needle and thread
    paper plane | c | send it over the fence | sent it over the fence | throwing it | TW | lost a wing | some tape
    snow globe | n | shake it and watch the flakes | shook it and watched the flakes | shaking it | - | came loose | some glue
    fan | p | make a breeze with it | made a breeze with it | waving it | TW | tore along a fold | some tape
    locket | m | open and close it | opened and closed it | opening it | WH | lost its chain | some string
    comb | n | hum through it | hummed through it | humming through it | WH | lost a tooth | some glue
    harmonica | m | play songs on it | played songs on it | playing it | WH | got stuck | a screwdriver
    guitar | w | strum it softly | strummed it softly | strumming it | - | lost a string | some wire
    violin | w | practice songs on it | practiced songs on it | practicing on it | - | lost a string | some glue
    trumpet | m | play marches on it | played marches on it | playing it | WH | bent in the middle | a hammer
    tambourine | c | shake it and sing | shook it and sang | shaking it | TW | split on one side | some tape
    flashlight | c | shine it at the ceiling | shone it at the ceiling | shining it | WH | went dark | a screwdriver
    magnifying glass | n | look at ants through it | looked at ants through it | looking through it | WH | came loose | some glue
    pouch | s | keep treasures in it | kept treasures in it | opening it | TWH | ripped at the bottom | a needle and thread
    rocking horse | w | ride it to far lands | rode it to far lands | riding it | - | lost an ear | some glue
    spinning top | c | make it whirl | made it whirl | spinning it | WH | chipped at the tip | a nail
    toy duck | w | pull it on a string | pulled it on a string | pulling it | W | lost its beak | some glue
    toy castle | w | guard it from dragons | guarded it from dragons | guarding it | - | lost a tower | some glue
    picture frame | w | keep drawings in it | kept drawings in it | dusting it | H | came apart | a nail
    birdhouse | w | watch birds visit it | watched birds visit it | painting it | W | lost its roof | a nail
    butterfly net | c | chase moths with it | chased moths with it | swinging it | TW | got a big hole | a needle and thread
    watering can | c | water the flowers with it | watered the flowers with it | filling it | W | got a leak | a patch
    beach ball | c | toss it up and catch it | tossed it up and caught it | tossing it | TW | got a leak | a patch
""")

INDOORS = _words(
    "library, attic, museum, bakery, toy shop, kitchen, cellar, garage, stable, theater, classroom, barn, greenhouse, cave"
)
# place | "in", "on", "at" or "by" | spots
PLACES_KID = _rows("""
    park | in | under the bench, behind the fountain, beside the swings, next to the statue
    garden | in | under the rosebush, behind the shed, between the bean rows, next to the birdbath
    beach | on | under the towel, behind the dune, beside the sandcastle, between the rocks
    playground | on | under the slide, behind the seesaw, beside the sandbox, inside the tunnel
    library | in | under the desk, behind the tall shelf, beside the globe, between the atlases
    attic | in | under the old trunk, behind the chimney, beside the dusty piano, inside the hatbox
    barn | in | under the straw, behind the tractor, beside the milk cans, inside the manger
    market | at | under the fruit stand, behind the cheese cart, beside the fish barrel, between the flower pots
    farm | on | under the hay cart, behind the henhouse, beside the trough, near the pigpen
    pond | at | under the dock, behind the cattails, beside the mossy log, among the lily pads
    zoo | at | under the map board, behind the ticket booth, beside the monkey house, near the seal pool
    museum | in | under the dinosaur, behind the marble pillar, beside the mummy case, near the suit of armor
    bakery | in | under the counter, behind the flour sacks, beside the oven, next to the bread rack
    toy shop | in | under the dollhouse, behind the game boxes, beside the window display, inside the toy chest
    train station | at | under the timetable, behind the ticket machine, beside the luggage cart, near the last platform
    hilltop | on | under the lone pine, behind the big boulder, beside the picnic table, near the windmill
    orchard | in | under the pear tree, behind the ladder, beside the apple crates, near the beehives
    kitchen | in | under the sink, behind the stove, beside the bread box, inside the cupboard
    cellar | in | under the stairs, behind the barrels, beside the potato bin, on the jam shelf
    garage | in | under the ladder, behind the paint cans, beside the toolbox, on the workbench
    schoolyard | in | under the oak, behind the bike rack, beside the flagpole, near the water tap
    harbor | at | under the nets, behind the fish crates, beside the anchor, near the lighthouse
    forest | in | under the ferns, behind the fallen trunk, beside the brook, among the mushrooms
    campsite | at | under the tent, behind the woodpile, beside the fire ring, near the canoe
    stable | in | under the saddle, behind the hay bales, beside the water bucket, inside the empty stall
    greenhouse | in | under the tomato table, behind the palm, beside the hose, among the seedlings
    theater | in | under the front row, behind the curtain, beside the stage, inside the costume box
    fair | at | under the merry-go-round, behind the popcorn wagon, beside the ring toss, near the big tent
    castle | at | under the drawbridge, behind the gate, beside the well, near the tower steps
    classroom | in | under the blackboard, behind the bookcase, beside the fish tank, inside the chalk box
""")
PLACES_WILD = _rows("""
    meadow | in | under the clover, behind the haystack, beside the daisies, near the wooden gate
    forest | in | under the ferns, behind the fallen trunk, beside the brook, among the mushrooms
    pond | at | under the willow, behind the cattails, beside the mossy log, among the lily pads
    stream | by | under the flat stone, behind the little falls, beside the ford, among the pebbles
    hill | on | under the thorn bush, behind the boulder, beside the sheep track, near the windmill
    cave | in | under the ledge, behind the tall rock, beside the puddle, near the bat corner
    berry patch | in | under the brambles, behind the broken wall, beside the stump, among the raspberries
    old bridge | at | under the arch, behind the railing, beside the signpost, among the nettles
    marsh | in | under the sedge, behind the reed bank, beside the heron nest, near the sunken boat
    waterfall | by | under the spray, behind the wet rocks, beside the pool, among the mossy roots
    clearing | in | under the oak, behind the log pile, beside the fox path, among the bluebells
    pine grove | in | under the needles, behind the crooked pine, beside the anthill, among the cones
    valley | in | under the hazel, behind the ruined hut, beside the spring, near the beech row
    orchard | in | under the pear tree, behind the ladder, beside the apple crates, near the beehives
    cornfield | in | under the scarecrow, behind the cart, beside the ditch, between the stalks
    mill | by | under the wheel, behind the sacks, beside the sluice, near the miller's door
    lake | at | under the jetty, behind the rowboat, beside the rushes, among the driftwood
    thicket | in | under the holly, behind the blackthorn, beside the badger trail, among the ivy
    barn | in | under the straw, behind the tractor, beside the milk cans, inside the manger
    beach | on | under the seaweed, behind the dune, beside the crab pool, between the rocks
    vineyard | in | under the vines, behind the stone hut, beside the barrels, between the grape rows
    quarry | in | under the ledge, behind the gravel heap, beside the rusty cart, near the deep pool
""")
WATERS = _words("the pond, the stream, the lake, the river, the well, the fountain, the canal, the deep ditch")
TREES = _words("""in the tall oak, in the old elm, in the pear tree, in the chestnut tree, in the pine, in the poplar, in the birch,
on the barn roof, in the maple, in the walnut tree, on the church roof, on the high wall, in the gutter, on a lamp post""")
TOOLS = {
    "T": _words("a ladder, a long pole, a rake, a fishing rod, a broom, a beanpole, a long stick, a hayfork"),
    "W": _words("a net, a long hook, a rake, a fishing rod, a sieve on a pole, a mop, a crooked stick, a rope"),
    "H": _words("a piece of wire, a pair of tongs, a long string, a hook, a bent fork, a thin stick, a straw with gum"),
}
HOLES = _words("""a crack in the wall, a hole in the ground, a hollow stump, a gap in the floor, an empty rabbit hole, a drain,
a deep pit, a narrow pipe, a crack in the rocks""")

DISHES = _rows("""
    pie | a | cherry, apple, pumpkin, blueberry, peach, rhubarb
    soup | a pot of | tomato, carrot, onion, pea, mushroom, turnip, leek
    cake | a | honey, lemon, chocolate, carrot, almond, ginger
    bread | a loaf of | nut, raisin, banana, corn, rye, pumpkin
    jam | a jar of | plum, strawberry, blackberry, apricot, cherry, gooseberry
    pudding | a bowl of | rice, vanilla, chocolate, fig, bread
    stew | a pot of | bean, potato, lentil, cabbage, barley
    tart | a | pear, lemon, raspberry, apricot, custard
    salad | a bowl of | cucumber, beet, bean, melon, potato
""")
SWEET = _words("pie, cake, pudding, tart, bread")
CROPS = _words("""sunflower, pumpkin, bean, melon, radish, carrot, tomato, pea, turnip, tulip, corn, cabbage, strawberry,
cucumber, poppy, onion, daisy, beet, lettuce, spinach, marigold, squash""")
# young | its mother | call | food | shelter
BABIES = _rows("""
    duckling | duck | peep | duckweed | the reeds
    chick | hen | cheep | corn | the henhouse
    calf | cow | moo | milk | the cowshed
    lamb | sheep | baa | clover | the sheepfold
    foal | mare | whinny | oats | the stable
    piglet | sow | squeal | turnips | the pigsty
    owlet | owl | screech | moths | the church tower
    gosling | goose | honk | grass | the riverbank
    fawn | doe | bleat | leaves | the deep woods
    cygnet | swan | whistle | pondweed | the island in the lake
    squab | pigeon | coo | seeds | the old bell tower
    goatling | goat | maa | thistles | the stony hill
    swallow chick | swallow | twitter | flies | the barn roof
    robin chick | robin | tweet | worms | the hawthorn
    fox cub | vixen | yip | berries | the sandy bank
    bat pup | bat | squeak | beetles | the dark cave
    donkey foal | donkey | bray | hay | the back paddock
    leveret | hare | whimper | grass | the wheat field
    bear cub | mother bear | growl | honey | the high cave
    crow chick | crow | caw | crumbs | the poplar
""")

HOBBIES = _words("""drawing pictures, counting clouds, climbing walls, singing songs, telling jokes, collecting stones,
jumping over puddles, looking at stars, picking flowers, making up rhymes, building dams, watching ants, chasing shadows,
humming tunes, solving riddles, rolling down hills, hiding in bushes, drawing maps, feeding birds, baking mud pies,
weaving grass, dancing in circles, balancing on logs, whistling melodies, reading maps, asking questions, finding feathers,
making daisy chains, listening to crickets, throwing acorns, naming beetles, painting stones, planning parties,
gathering leaves, watching sunsets, carving sticks, playing hide and seek, stacking pebbles, making up games, splashing about""")
TRAITS = _words("""curious, cheerful, quiet, clever, gentle, busy, lively, shy, merry, thoughtful, dreamy, friendly, bold,
patient, playful, bright, stubborn, careful, restless, polite, lucky, sleepy, jolly, eager, brave, kind, messy, noisy""")
HOUSES = _words(
    "cottage, house, cabin, farmhouse, brick house, wooden house, stone house, red house, white house, blue house"
)
LANDS = _words("""near the mill, by the sea, at the edge of the woods, beside the railway, on a windy hill, across from the church,
down a long lane, behind the bakery, near the harbor, next to the school, by the river, under the chestnut trees,
above the valley, beside the canal, in the middle of the village, close to the lighthouse, over the shoe shop, by the crossroads""")
TIMES = _rows("""
    sunny | the sun was shining | the sky turned pink
    windy | the wind was blowing | the wind died down
    cloudy | gray clouds hung low | the clouds drifted off
    warm | the air was warm | the evening grew cool
    cold | there was frost on the grass | the stars came out
    rainy | rain was dripping from the roof | the rain stopped
    foggy | fog lay over everything | the fog lifted
    hot | it was very hot | a cool breeze came up
    misty | mist was rising | the mist was gone
""")
DAYS = _words("morning, afternoon, day, Monday, Tuesday, Thursday, Friday, Saturday, Sunday")
FEARS = _rows("""
    the dark | it was pitch black | felt {his} way through the dark | keep a small light in mind | kid wild
    thunder | thunder rolled across the sky | walked on through the thunder | count slowly until the rumble ends | kid wild
    deep water | there was a stream, cold and deep | waded into the stream | take one small step at a time | kid wild
    high places | there was a steep wall to climb | climbed all the way up | look at the sky and never down | kid wild
    big dogs | a big dog stood there, barking | walked past the big dog | hold out a flat hand and wait | kid
    spiders | a fat spider hung on a thread | ducked under the spider | think of how tiny its heart is | kid wild
    ladders | there was only a shaky ladder | climbed the ladder | hum one note for each rung | kid
    crowds | there was a noisy crowd | walked through the crowd | look for one kind face | kid wild
    strangers | a tall stranger stood in the way | greeted the stranger | begin with a plain hello | kid wild
    bees | bees were buzzing everywhere | walked past the bees | move as slowly as honey | kid wild
    storms | a storm shook the trees | leaned into the storm | breathe as slowly as the tide | kid wild
    narrow bridges | there was a bridge, narrow as a plank | crossed the bridge | hold on and look straight ahead | kid wild
    shadows | long shadows were creeping | waved at the shadows | give each shadow a silly name | kid wild
    caves | there was a cave, wet and black | walked into the cave | keep to the left wall | kid wild
    bogs | there was a bog, brown and bubbling | tiptoed over the bog | step only where grass grows | kid wild
    ghosts | something white was flapping | pulled at the white thing, and it was a sheet | ask it what it wants | kid wild
    geese | five geese came hissing | marched through the geese | flap your elbows like wings | kid wild
    echoes | a hollow voice came back from the rocks | answered the echo | tell it a joke | kid wild
""")
# what is built | of | what is weak | what knocks it down | what makes it strong
BUILDINGS = _rows("""
    sandcastle | wet sand | the walls | a wave washed over it | farther from the water | kid | on the beach, at the seaside
    treehouse | old planks | the floor | a strong gust shook it | with twice as many nails | kid | in the oak, in the elm
    raft | logs and rope | the knots | the current pulled it apart | with tighter knots | kid wild | at the lake, by the river
    dam | mud and sticks | the middle | the stream burst through it | with heavy stones below | kid wild | at the brook, by the stream
    hut | branches and leaves | the roof | the wind lifted it off | with clay between the branches | kid wild | in the forest, in the clearing
    bridge | flat boards | the legs | it sagged and fell in | with thick posts underneath | kid wild | at the brook, by the ditch
    snow fort | packed snow | the corner | the noon sun melted it | in the shade of the wall | kid | in the snowy yard, on the white lawn
    tower | wooden blocks | the bottom | it swayed and crashed | with the biggest blocks below | kid | in the playroom, on the carpet
    tent | sticks and sheets | the center | it folded up like a fan | with a pole in the center | kid wild | in the meadow, on the lawn
    fence | twigs and twine | the gate | a goat pushed it over | with deep holes for the posts | kid wild | in the garden, at the vegetable patch
    windmill | card and wire | the wings | the wings flew away | with a nail through the middle | kid | on the hill, on the balcony
    scarecrow | straw and rags | the legs | it tipped onto its nose | with a stake down its back | kid wild | in the cornfield, on the farm
    cart | crates and wheels | the axle | the wheels rolled off | with a thick iron rod | kid | in the garage, in the yard
    nest box | bark and moss | the lid | a branch knocked it down | with wire around the trunk | kid wild | in the orchard, in the beech wood
    stage | crates and boards | the steps | the boards slid apart | with a beam across the crates | kid wild | in the barn, in the square
""")
# the strange noise | what it was | what had to be done
NOISES = _rows("""
    scratching | a kitten | shut in by mistake | let it out | in the cupboard, in the wardrobe, in the shed
    tapping | a loose shutter | swinging in the wind | tied it with a string | outside the window, in the next room
    humming | a swarm of bees | moving into an empty box | stepped softly away | in the attic, on the balcony
    thumping | a baby rabbit | stuck in a flowerpot | tipped the pot | on the porch, behind the house
    squeaking | a rusty hinge | turning to and fro | dabbed some oil on it | at the cellar door, at the garden gate
    dripping | a leaking pipe | filling an old pan | turned off the water | under the sink, in the bathroom
    rustling | a hedgehog | looking for beetles | gave it a dish of water | under the hedge, behind the shed
    ticking | an alarm clock | forgotten under a cloth | turned it off | in the trunk, under the bed
    buzzing | a fly | caught in a jar | lifted the lid | on the shelf, in the pantry
    whimpering | a puppy | tangled in a net | cut the net | under the porch, in the garage
    chirping | a young sparrow | fallen from its nest | lifted it back | on the windowsill, in the gutter
    creaking | a rope swing | moving in the breeze | hung it up higher | in the garden, by the big tree
    snoring | a fat badger | asleep in the leaves | woke it up | behind the woodpile, under the stairs
    jingling | a lost goat | wearing a bell | led it to its field | in the yard, by the fence
    croaking | a green frog | trapped in a bucket | carried it to the water | by the well, in the cellar
    crunching | a small donkey | eating windfall apples | gave it one last apple | under the apple tree, by the wall
    flapping | a white sheet | left out on the line | took it down | behind the house, in the courtyard
    gnawing | a brown mouse | nibbling at a crust | shooed it outside | in the kitchen, in the pantry
    hooting | a small owl | sitting on a beam | opened a window for it | in the attic, under the roof
    clanking | a tin can | rolling in the draft | picked it up | on the stairs, in the hall
""")
SKILLS = _rows("""
    race | run | run faster than anyone | ran up and down the lane | the finish line | kid wild
    swimming match | swim | swim like a fish | swam from bank to bank | the far bank | kid
    singing contest | sing | sing higher than a lark | sang scales at sunrise | the end of the song | kid wild
    jumping contest | jump | jump over any wall | jumped over logs and ditches | the last bar | kid wild
    sled race | steer | steer better than anyone | steered around barrels | the foot of the slope | kid
    spelling contest | spell | spell every word there is | spelled words from the newspaper | the last word | kid
    drawing contest | draw | draw better than a painter | drew apples and shoes | the closing bell | kid
    rowing race | row | row without getting tired | rowed around the little island | the red buoy | kid wild
    climbing contest | climb | climb like a monkey | climbed ropes and poles | the top of the pole | kid
    dancing contest | dance | dance on one toe | danced around the table | the last tune | kid wild
    pie contest | bake | bake better than a cook | baked one pie after another | the judges' table | kid
    stilt race | balance | balance on anything | walked along beams and rails | the white line | kid wild
""")
CHORES = _rows("""
    sweeping the yard | swept the yard
    carrying firewood | carried firewood
    washing windows | washed windows
    weeding the beds | weeded the beds
    shelling peas | shelled peas
    raking leaves | raked leaves
    feeding the rabbits | fed the rabbits
    polishing boots | polished boots
    peeling potatoes | peeled potatoes
    stacking boxes | stacked boxes
    watering the herbs | watered the herbs
    folding sheets | folded sheets
    picking beans | picked beans
    scrubbing pots | scrubbed pots
    painting the gate | painted the gate
    brushing the pony | brushed the pony
    shoveling snow | shoveled snow
    winding wool | wound wool
""")


JUNK = _words("""an old nail, a broken cup, a wet leaf, a rusty pin, a bent fork, a lost sock, a pine cone, a torn letter, a dead branch,
a bit of string, a cracked plate, an empty bottle, a snail, a horseshoe, a walnut, a chicken bone, a glove, a candle end,
a bottle cap, a scrap of cloth, a potato, a paper bag, a clothespin, a cork, a rotten apple, an old boot""")
LURES = _words("""yellow butterfly, white butterfly, blue butterfly, dragonfly, soap bubble, silver moth, maple leaf, dandelion seed,
firefly, ladybug, hummingbird, gray feather, red balloon, bluebird, bumblebee, colored scrap of paper""")
SOUNDS = _words("""the trees rustled, an owl called far away, the wind moaned, twigs cracked, a dog howled in the distance,
the bushes whispered, something splashed, a door banged somewhere, crows cried overhead, fog crept closer""")
WAYS = _words("""went hand in hand, sang all the way, counted their steps, told each other stories, hummed a march, walked in the last light,
passed a scarecrow, crossed a brook, followed an old wall, kept to the left, asked a beetle for fun, looked at the first star""")
SPICES = _rows("""
    sugar | salt
    salt | sugar
    flour | soap powder
    cinnamon | pepper
    honey | mustard
    butter | glue
    milk | vinegar
    cream | paint
    parsley | grass
    vanilla | fish oil
    yeast | chalk
    nutmeg | sand
    oil | ink
    cocoa | mud
""")
SCENERY = _words("""a blackbird sang on the fence, two snails raced along the path, smoke rose from the chimneys, a cat slept on the wall,
church bells rang far away, a train whistled, sparrows bathed in the dust, a cart rattled by, somebody was practicing the piano,
the poplars bent and whispered, an old dog yawned, washing danced on the line, a woodpecker hammered, a kettle whistled somewhere,
butterflies wobbled over the thistles, a spider mended its web, gnats danced in a column, the grass was full of dew, leaves whirled about,
a magpie scolded, ants carried crumbs, a cuckoo called twice, pigeons strutted about, a weathercock creaked, the brook gurgled,
geese flew over in a wedge, a rooster crowed late, chestnuts dropped with a plop, a hedge was full of twitter, bumblebees grumbled,
someone sawed wood, a plane drew a line across the sky, a lizard basked on a stone, mushrooms had sprung up overnight, a tractor hummed,
a swallow skimmed the ground, acorns crunched underfoot, a frog plopped away, the hay was freshly cut, elder bushes bloomed""")
WORE = _words("""wore a yellow raincoat, wore green boots, wore a knitted sweater, wore a blue jacket, wore an apron with pockets, wore thick mittens,
wore a brown vest, wore striped socks, wore a bow tie, wore a gray shawl, wore a purple cardigan, wore a sailor collar, wore overalls,
wore a plaid shirt, wore a leather belt, wore a red bandana, hummed a tune, whistled softly, hopped on one leg, counted the steps,
swung a stick, chewed a blade of grass, skipped over the cracks, kicked a pebble along, sang a song about a whale, recited a rhyme""")
SMELLS = _words("""fresh paint, cut grass, warm bread, wet earth, pine needles, roasted almonds, roses, old wood, seaweed, lavender, hay, mint,
smoke, ripe plums, soap, lilac, moss, rain, beeswax, thyme, straw, damp stone, clover, resin, vinegar, jasmine""")
PASTIMES = _words("""knitting a sock, fixing the gutter, reading the newspaper, shelling beans, writing a letter, darning a shirt, baking rolls,
washing the cups, pruning the hedge, patching a tire, sorting buttons, hanging up the wash, chopping leeks, humming in the kitchen,
taking a nap, oiling the hinges, beating the carpets, bottling pears, polishing spoons, picking currants, sewing curtains, sanding a chair,
ironing a tablecloth, planting leeks, sharpening a pencil, solving a crossword, making candles, feeding the stove, plucking lavender""")
THIEVES = _words("""two crows, three geese, a goat, some ants, a pair of magpies, four ducks, a stray dog, a hungry gull, a troop of mice, six sparrows,
a jackdaw, a fat raccoon, some wasps, a donkey, three hens, a billy goat, a family of rats, two squirrels""")
STIRS = _words("""stirred slowly, stirred with a big spoon, stirred a hundred times, stirred with both arms, stirred and sang,
stirred and counted, stirred until it was smooth, stirred like a miller""")


CHORES_WILD = _rows("""
    gathering twigs | gathered twigs
    picking seeds | picked seeds
    raking leaves | raked leaves
    rolling stones | rolled stones
    carrying water | carried water
    sorting acorns | sorted acorns
    drying herbs | dried herbs
    airing the bedding | aired the bedding
    pulling weeds | pulled weeds
    clearing the path | cleared the path
    stacking hay | stacked hay
    picking berries | picked berries
    weaving mats | wove mats
    cracking nuts | cracked nuts
    digging roots | dug roots
    patching the roof | patched the roof
""")
BEDS = _words("""under the kitchen window, beside the gate, next to the fence, behind the shed, along the sunny wall, near the rain barrel,
in the corner of the garden, by the front door, beside the gooseberries, next to the compost heap, near the old well, under the clothesline""")
WEEKDAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
# Slots that are one choice from one list.
SIMPLE = {
    "hobby": HOBBIES,
    "trait": TRAITS,
    "day": DAYS,
    "weekday": WEEKDAYS,
    "water": WATERS,
    "tree": TREES,
    "hole": HOLES,
    "junk": JUNK,
    "lure": LURES,
    "sounds": SOUNDS,
    "ways": WAYS,
    "stirred": STIRS,
    "scenery": SCENERY,
    "wore": WORE,
    "smell": SMELLS,
    "pastime": PASTIMES,
    "thieves": THIEVES,
}


def character(teller, role: str) -> tuple[str, int, dict[str, str]]:
    """Name, gender (0 he, 1 she) and attributes of the one who plays `role` (h, f, m or k)."""
    world = teller.world
    if role == "m":
        gender = teller.pick(2)
        return teller.one_of((UNCLES, AUNTS)[gender]), gender, {}
    if role == "k":
        kind, says, work, gift = teller.one_of(HELPERS_KID if teller.kind == "kid" else HELPERS_WILD)
        return f"the {kind}", teller.pick(2), {"kind": kind, "said": says, "work": work, "gift": gift}
    # A friend is most often of the other gender: then "he" and "she" tell the two apart.
    gender = teller.pick(2)
    if role == "f" and "h" in world:
        gender = 1 - world["h"].gender if teller.pick(4) else world["h"].gender
    if teller.kind == "kid":
        names, kind, went, home, gift = (
            (BOYS, GIRLS)[gender],
            ("boy", "girl")[gender],
            "[walked|ran|hurried]",
            "",
            "",
        )
        home = f"{teller.one_of(HOUSES)} {teller.one_of(LANDS)}"
    else:
        names = (HE_ANIMALS, SHE_ANIMALS)[gender]
        taken = {other.attributes["kind"] for other in teller.cast if "home" in other.attributes}
        gift = world.get("gift") if role == "f" else None
        rows = [
            row
            for row in ANIMALS
            if row[0] not in taken and (gift is None or row[3] == gift) and (role == "f" or row[3] != world.get("gift"))
        ]
        kind, home, went, gift = teller.one_of(rows)
    taken = {other.name for other in teller.cast}
    name = teller.one_of([name for name in names if name not in taken] if taken else names)
    return name, gender, {"kind": kind, "home": home, "went": went, "gift": gift}


def _thing(teller, other: str = "", where: str = "") -> tuple[str, ...]:
    return teller.one_of([row for row in THINGS if row[0] != other and (not where or where in row[5])])


def choose(teller, key: str) -> None:
    """Puts `key`, and what is decided with it, into the teller's world; KeyError for a slot that is not known."""
    world, kid = teller.world, teller.kind == "kid"
    if key in ("o", "oa", "do", "did", "doing", "broke", "mender"):
        row = _thing(teller, world.get("x", ""), world.get("where", ""))
        world["o"], world["oa"] = row[0], teller.one_of(_LOOKS[row[1]])
        world["do"], world["did"], world["doing"], world["broke"], world["mender"] = row[2:5] + row[6:8]
    elif key in ("x", "xa"):
        row = _thing(teller, teller.thing("o"))
        world["x"], world["xa"] = row[0], teller.one_of(_LOOKS[row[1]])
    elif key in ("oc", "xc"):
        world[key] = "{oa} {o}" if key == "oc" else "{xa} {x}"
    elif key in ("p", "pin", "p1", "p2", "p3", "q", "qin", "q1", "q2", "q3"):
        letter = key[0]
        other = world.get("q" if letter == "p" else "p")
        rows = PLACES_KID if kid else PLACES_WILD
        shut_out = INDOORS if "outdoors" in world else ()
        row = teller.one_of([row for row in rows if row[0] != other and row[0] not in shut_out])
        spots = list(_words(row[2]))
        world[letter], world[f"{letter}in"] = row[0], f"{row[1]} the {row[0]}"
        for number in "123":
            world[letter + number] = spots.pop(teller.pick(len(spots)))
    elif key in ("food", "afood", "taste", "dish", "food2", "afood2"):
        second = "2" if key.endswith("2") else ""
        while True:
            dish, article, tastes = teller.one_of([row for row in DISHES if "sweet" not in world or row[0] in SWEET])
            taste = teller.one_of(_words(tastes))
            if f"{taste} {dish}" != world.get("food" if second else "food2"):
                break
        world["food" + second], world["afood" + second] = f"{taste} {dish}", article + " {food" + second + "}"
        if not second:
            world["taste"], world["dish"] = taste, dish
    elif key in ("crop", "crop2"):
        world[key] = teller.one_of([crop for crop in CROPS if crop != world.get("crop")])
    elif key in ("baby", "mother", "call", "feed", "shelter"):
        world["baby"], world["mother"], world["call"], world["feed"], world["shelter"] = teller.one_of(BABIES)
    elif key in ("baby2", "mother2"):
        rows = [row for row in BABIES if row[0] != teller.thing("baby")]
        world["baby2"], world["mother2"] = teller.one_of(rows)[:2]
    elif key == "nest":
        world[key] = teller.character("h").attributes["home"]
    elif key in ("weather", "sky", "evening"):
        world["weather"], world["sky"], world["evening"] = teller.one_of(TIMES)
    elif key == "trait2":
        world[key] = teller.one_of([trait for trait in TRAITS if trait != world.get("trait")])
    elif key in SIMPLE:
        world[key] = teller.one_of(SIMPLE[key])
    elif key in ("spice", "wrong"):
        world["spice"], world["wrong"] = teller.one_of(SPICES)
    elif key == "tool":
        world[key] = teller.one_of(TOOLS[world["where"]]).partition(" ")[2]
    elif key in ("fear", "scene", "dared", "advice"):
        row = teller.one_of([row for row in FEARS if teller.kind in row[4]])
        world["fear"], world["scene"], world["dared"], world["advice"] = row[:4]
    elif key in ("building", "stuff", "weak", "fell", "better", "site"):
        row = teller.one_of([row for row in BUILDINGS if teller.kind in row[5]])
        world["building"], world["stuff"], world["weak"], world["fell"], world["better"] = row[:5]
        world["site"] = teller.one_of(_words(row[6]))
    elif key in ("noise", "source", "state", "deed", "nook"):
        *row, nooks = teller.one_of(NOISES)
        world["noise"], world["source"], world["state"], world["deed"] = row
        world["nook"] = teller.one_of(_words(nooks))
    elif key in ("contest", "skill", "boast", "practice", "goal"):
        row = teller.one_of([row for row in SKILLS if teller.kind in row[5]])
        world["contest"], world["skill"], world["boast"], world["practice"], world["goal"] = row[:5]
    elif key in ("chore", "chored"):
        world["chore"], world["chored"] = teller.one_of(CHORES if kid else CHORES_WILD)
    elif key in ("bed1", "bed2"):
        world[key] = teller.one_of([bed for bed in BEDS if bed not in (world.get("bed1"), world.get("bed2"))])
    else:
        raise KeyError(f"no such slot in a story: {key!r}")

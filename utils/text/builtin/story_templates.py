"""Templates of the built-in stories.

In a template `[a|b]` stands for one of its alternatives, `{toy}` for a fact of the story
(stories.py), and `{likes}`, `{sky}`, `{moral}`, `{one_day}` and `{one_night}` for other templates.
An alternative that stands twice is twice as likely. White space within a paragraph counts as one
space; a blank line ends the paragraph.
"""

ONCE_OPENING = """[Once upon a time, there was|Once upon a time, there was|Once upon a time, there
lived|Once there was|There once was] a [{trait}|little|{trait} little|{trait} and {trait2}] {kind}
[named|called] {hero}. {likes}"""
ONE_DAY_OPENING = """One {day}, a [{trait}|little|{trait} little] {kind} [named|called] {hero} [woke
up early|looked out of the window|had nothing to do|put on {his} {color2} shoes|felt very
{glad}]."""
LIKES = """[{hero} [loved|liked] to play {at}.|Every {often}, {hero} went to {place}.|{hero} lived
in a {look} house with {his} {adult}.|{hero} had a friend [named|called] {friend}.|Everyone knew
{him}.|] [{He} [liked|loved] {foods} [more than anything|very much|best of all].|{His} favorite
color was {color2}.|{He} was [always|almost always] {glad}.|]"""
SKY = "[{Weather}.|All around, {weather}.|{Weather}, and {hero} was {glad}.||]"
MORAL = """[From that day on,|After that,|Ever since,] {hero} [always remembered|never forgot|knew]
how [good|important] it is"""

STORY_PLOTS = {
    "a lost toy": """
{hero} had a {color} {toy}. [It was a gift from {his} {adult}.|It was {his} favorite thing
in the world.|{He} took it everywhere.] {one_day} {hero} [took it to {place}|played with it {at}].
{sky}

[When it was time to go home,|A little later,|After a while,] {he} [reached for|looked for] the
{toy}, but it was [gone|not there|nowhere to be seen]. "Oh no! [Where is my {toy}?|I have lost my
{toy}!]" [cried {hero}|{he} cried]. {He} felt very {sad}. [{friend} came running.|{friend} heard
{him}.] "[Do not cry|Do not worry|Dry your eyes]," said {friend}. "[We can look for it together|I
will help you find it|Two can see more than one]." They looked {spot2}, but [they only found a
{color2} {toy2}|there was only a {animal}|nothing was there].

[Then|At last|Just before dark] {friend} looked {spot}. "[Here it is|I see it|Look]!" {fhe}
[shouted|called]. There was the {color} {toy}[, a bit dirty but whole|, safe and sound|]. {hero}
[hugged {friend} and said, "Thank you|was so {glad} that {he} danced. "Thank you, {friend}|laughed.
"You are a true friend]!" {He} [cleaned the {toy}|carried the {toy} home with both hands|let
{friend} play with it all evening]. [{moral} to have a friend who helps.|That night the {toy} [lay
next to {his} pillow|slept in {his} bed].|]""",
    "a promise": """
{one_day} {his} {adult} said, "{hero}, will you {chore} [today|before supper|while I am
away]?" "[Yes, I promise|I promise|Of course, I promise]," said {hero}. {sky}

Just then {friend} came by with a {look} {toy}. "[Come and play|Come with me to {place}|Let us go to
{place}]!" [said|called] {friend}. {hero} [wanted to go very much|looked at the {toy} for a long
time]. [But {he} remembered {his} promise.|Then {he} thought of what {he} had promised.] "[I can not
come yet|Not now|Please wait]," {he} said. "First I have to {chore}." [{friend} [was sad|sighed],
but {fhe} understood.|"Then I will help you," said {friend}. Together they were twice as fast.|"A
promise is a promise," said {friend}, and {fhe} sat down to wait.]

[When the work was done,|Soon the work was done, and] {his} {adult} came [home|back] and smiled.
"You kept your word," {ahe} said. "[I am proud of you|I knew I could trust you]." {Ahe} gave them
both [a plate of {foods}|some warm {foods}|{foods} and milk], and [then they|the two friends] played
with the {toy} until [dark|bedtime|the stars came out]. {hero} was {glad}. [{moral} to keep a
promise.|]""",
    "a broken jar": """
{his_adult} had a {color} {jar} that stood [by the window|on a high shelf|on the table].
"[Please be careful with it|Do not touch it, please]," {ahe} often said. {one_day} {hero} was
[running|jumping|dancing] in the house[ with {friend}|]. Crash! The {jar} fell to the floor and
broke[ into {number} pieces|].

{hero} was [scared|afraid]. [First {he} hid the pieces {nook}.|"I could say that the {animal} did
it," {he} thought.] But {his} stomach felt [heavy|strange|bad], and {he} could not [eat|sleep|play].
At last {he} went to {his} {adult}. "[I broke your {jar}|It was me]," {he} said. "I am very sorry."
{his_adult} [was quiet for a moment|took a deep breath|looked at the pieces]. "[Thank you for
telling me the truth|I am sad about the {jar}, but I am glad that you were honest]," {ahe} said.

[Together they glued the pieces, one by one.|They sat down with a pot of glue and mended it.] [It
took all {often}.|It was slow work.] The {jar} [had {number} thin lines now|looked a little
crooked], but {his} {adult} liked it [even more|just as much]. [{moral} to tell the truth.|"Now it
has a story," {ahe} said.|]""",
    "sharing food": """
{one_day} {hero} [had a basket|got a bag|found a box] full of {foods}. "[All for me|I
will eat every one]!" {he} [said|thought], and {he} went to sit {at}. {sky}

[Soon|After a while] {friend} walked by. "[I am so hungry|My basket is empty]," said {friend}. "May
I have [one|some]?" "[No, they are mine|No, go away]," said {hero}. {friend} [went away with {fhis}
head down|looked {sad} and left]. {hero} ate [{number}|more and more] {foods}, but they did not
taste [good|as good as before]. {He} felt [alone|lonely|bad], and {his} belly began to hurt.

So {he} [ran|hurried] after {friend}. "[Wait! I was wrong|I am sorry, {friend}|Please come back],"
{he} said. "[Let us share them|Half of them are for you]." {friend} smiled. They [sat {spot} and|sat
down and] ate the [rest of the {foods}|{foods}] together. [Now they tasted sweet.|Even the {animal}
got a crumb.] [The next day {friend} brought a {look} {toy} and shared it with {hero}.|] [{moral} to
share.|Food tastes best with a friend.|]""",
    "fear of the dark": """
{hero} was not afraid of [many things|much], but {he} did not like the dark. {one_night}
{he} was lying in bed[ with {his} {color} {toy}|]. [Outside, rain was falling.|The moon hid behind
the clouds.|] Then {he} heard {fear}. {hero} pulled the blanket over {his} head. "[Who is there|What
was that|What is it]?" {he} whispered. Nobody answered.

{He} called {his} {adult}. [{his_adult} sat down on the bed.|{his_adult} came with a lamp.] "[Let us
look together|Being brave means to look even when you are scared]," {ahe} said. {hero} [took {ahis}
hand|held {ahis} hand tight], and they walked slowly [down the stairs|to the window|to the
door|through the hall]. There it was again! {hero} was shaking, but {he} [kept walking|opened {his}
eyes|did not run].

It was {cause}. {hero} [began to laugh|laughed and laughed]. "[Is that all|Was that the monster]?"
{he} said. "[How silly I was|How funny]!" "[No|Not at all]," said {his} {adult}. "You were very
brave." [{hero} went back to bed and slept until morning.|Back in bed, {he} told the {toy} all about
it.] [The next night {he} heard the same sound, and {he} only smiled.|{moral} to look at what scares
you.|]""",
    "a rescue repaid": """
{one_day} {hero} was walking {at}. {sky} {He} heard a small voice. "Help! [Please help
me|I am stuck]!" {hero} looked around. There, {spot}, was a {size} {animal}. [It was caught under a
stone.|It was tied up in a piece of string.|It had fallen and could not get up.]

"[Do not be afraid|Hold still]," said {hero}. "[I will help you|I will get you out]." {He} [worked
slowly and carefully|pulled with all {his} strength|used {his} {color} {toy}], and soon the {animal}
was free. "[Thank you|You saved me]!" said the {animal}. "[One day I will help you|I will not forget
this]." {hero} [smiled|laughed kindly]. "You are so small," {he} said[, "but thank you."|. "How can
you ever help me?"]

[A week later|Some days later|Not long after that], {hero} [got lost|lost {his} way] {at2}. [It was
getting dark.|The path was gone.] {He} sat down and felt {sad}. Then {he} heard a small voice. It
was the {animal}! "[Follow me|I know the way]," it said. It [went ahead|showed {him} the way], past
the {look} [rock|tree|stump|fence], all the way home. "[Now you have saved me|Thank you, little
friend]," said {hero}. [{moral} to be kind to everyone, big or small.|They were friends for ever
after.|No friend is too small.]""",
    "learning a skill": """
{hero} wanted to learn to {skill}. {friend} could {skill} very well, and it looked so
easy. {one_day} {hero} tried it {at}. [It went wrong.|It did not work at all.] {He} tried again, and
[it was even worse|it went wrong once more]. "[I will never learn it|I give up|This is too hard]!"
{he} said, and {he} felt {sad}.

{friend} sat down next to {him}. "Do you know how often I [failed|tried] at first?" {fhe} asked.
"[{Number} times|More than {number} times]! [Try a little every day|Go slowly, one step at a time]."
So {hero} practiced every {often}. [On the first day {he} was slow.|At first {he} made many
mistakes.] [After {number} days it was a bit better.|Little by little it got better.] [Sometimes
{friend} came to watch.|{his_adult} cheered for {him}.|]

[At last|In the end|Then, one day,] it worked! "[Look, I can {skill}|I did it]!" [shouted|called]
{hero}. [Everyone clapped.|{friend} clapped and cheered.|{his_adult} made {foods} to celebrate.]
{hero} was so {glad}. [{moral} to keep trying.|Then a {size} {animal} asked {him}, "Will you teach
me?" and {hero} said yes.|]""",
    "a lie": """
{one_day} {hero} took {number} {foods} from the kitchen without asking. {He} ate them
{spot}. [They were sweet and still warm.|{sky}] Soon {his} {adult} asked, "Who took the {foods}?
They were for [{friend}'s birthday|our guests|the fair]." "[It was not me|I do not know]," said
{hero}. "[Maybe it was {friend}|I saw {friend} here]."

So {his} {adult} [was angry with {friend}|sent {friend} home]. {friend} [had tears in {fhis}
eyes|did not understand why]. {hero} saw it and felt [terrible|ashamed|very bad]. [All {often} {he}
thought about it.|{He} could not look at {his} {color} {toy}.] Then {he} [stood up|took a deep
breath] and went to {his} {adult}. "I lied," {he} said. "[I took the {foods}|It was me, not
{friend}]."

"[It is not easy to say that|It was wrong to lie, but it was brave to tell me]," said {his} {adult}.
"[How can you make it right|What will you do now]?" {hero} [ran to {friend} and said, "I am
sorry|went to {friend}. "Please forgive me]." {friend} [thought for a while and nodded|forgave
{him}]. Together they went and got new {foods}. [{moral} to tell the truth.|These tasted much
better.|]""",
    "a seed": """
{one_day} {his} {adult} gave {hero} a [tiny|small|round] seed. "[If you take care of it,
something wonderful will grow|Be patient with it]," {ahe} said. {hero} [dug a hole|made a little bed
of earth] {at} and [put the seed in|planted the seed]. [Every {often}|Each day] {he} gave it water[
from a {color} cup|].

For {number} days [nothing happened|there was nothing to see]. "[It is asleep|Maybe it is broken],"
said {friend}. {hero} [wanted to dig it up|was {sad}], but {his} {adult} shook {ahis} head. "[Good
things take time|Wait a little longer]," {ahe} said. [Then it rained all night.|Then the sun came
out.|] The next morning there was a [little|tiny] green leaf! {hero} [shouted with joy|jumped up and
down]. [A {animal} wanted to eat it, so {he} built a [small|little] fence.|{He} pulled the weeds and
talked to it.]

By [the end of summer|autumn], it was a [tall|strong|fine] {plant} plant[, taller than {friend}|, as
high as the fence|]. {hero} [invited|called] {friend} and {his} {adult} to see it. [They had a party
{at}.|"You were patient," said {his} {adult}. "I am proud of you."] {hero} [kept some seeds for next
year|gave one seed to {friend}]. [{moral} to wait for good things.|]""",
    "a newcomer": """
{one_day} a new {fkind} came to {place}. {Fhis} name was {friend}. {friend} [stood
alone|sat alone] {spot} and [looked at the ground|did not say a word]. [The others were playing with
a {color} {toy}.|Nobody asked {fhim} to play.] {hero} saw it. "[How lonely {fhe} looks|I would not
like to be alone]," {he} thought.

So {hero} went over. "[Hello|Hi], I am {hero}," {he} said. "[Do you want to play|Would you like some
{foods}]?" {friend} looked up. "[I do not know anyone here|Nobody here knows me]," {fhe} said [in a
low voice|softly]. "Now you know me," said {hero}. [They built a {look} house of sand.|They made a
{look} boat of paper.|They played with {hero}'s {toy2}.] [{friend} knew a funny song, and soon both
of them sang.|It turned out that {friend} could {skill}.]

When the sun went down, {friend} [smiled|was {glad}]. "[Today was my best day|I am not lonely any
more]," {fhe} said. "Will you come again tomorrow?" "[Yes|Of course]," said {hero}. "[We are friends
now|I will bring the {toy2}]." [{moral} to be kind to someone new.|From then on, they met {at} every
{often}.|]""",
    "a race": """
{hero} was [very fast|the fastest of all], and {he} knew it. "[Nobody can beat me|I always
win]," {he} said [every day|to everyone]. {friend} was slow, but {fhe} never gave up. {one_day}
there was a race {at}. The prize was a {color} {toy}. {sky}

"One, two, three, go!" {hero} ran off like the wind. [Soon {he} was far ahead.|{He} could not even
see {friend} behind {him}.] "[I have plenty of time|I can take a rest]," {he} thought. {He} [stopped
to eat some {foods}|lay down {spot}|stopped to watch a {animal}] and [soon fell asleep|forgot about
the race]. {friend} [walked on and on|went on, step by step], without a stop.

When {hero} [woke up|looked up], everyone was cheering. {friend} had won! {hero} [was {sad}|turned
red], but then {he} went to {friend}. "[You ran a good race|You did well]," {he} said. "[I was too
proud|I will not boast again]." {friend} [smiled and shook hands with {him}|let {him} hold the
{toy}]. [{moral} to be modest.|Slow and steady can be the fastest way.|Then they [both|] went to get
some {foods}.]""",
    "a gift made by hand": """
It was almost {his} {adult}'s birthday. {hero} wanted to give {ahim} something
[nice|special], but {he} had [only one coin|only {number} coins|no money]. {one_day} {he} went to
{place} and saw a {color} {toy}. It cost too much. {hero} felt {sad}.

"[Why do you look so sad|What is wrong]?" asked {friend}. {hero} told {fhim}. "[A gift does not have
to cost money|The best gifts are made by hand]," said {friend}. [They thought for a long time.|They
sat down {spot} and thought.] Then {hero} had an idea. {He} [gathered {number} shells|picked
{number} flowers|found a piece of wood|took some paper and paint] and worked all {often}. [{friend}
helped {him} with the hard parts.|{He} hid it {nook} so that nobody could see it.]

On the birthday, {hero} [gave {his} {adult} the gift.|said, "This is for you!"] It was a [picture of
{place}|{look} {toy2} made by hand|little {animal2} made of clay]. {his_adult} [had tears in {ahis}
eyes|was so {glad}]. "[This is the best gift I ever got|You made this yourself? It is lovely],"
{ahe} said, and {ahe} gave {hero} a [big|long|warm] hug. [{moral} to give something from the
heart.|Afterwards they all ate {foods}.|]""",
    "a lost baby animal": """
{one_day} {hero} found a baby {animal} {spot}. It was [all alone|cold and hungry]. "[Where
is your mother|Are you lost]?" asked {hero}. The baby {animal} [only cried|did not answer]. {sky}
{hero} wanted to take it home and keep it. [{He} even thought of a name for it.|"I will call it
{pet}," {he} said.]

{He} showed it to {his} {adult}. "[Is its mother not worried|How would you feel if you were lost]?"
asked {his} {adult}. {hero} thought about that. [It was hard, but {he} knew what was right.|Then
{he} nodded slowly.] [{He} put the baby in a {color} basket and|With the baby in {his} arms, {he}]
went back to {place}. {He} asked a {animal2}, and it [pointed to a tree|told {him} where to go].
{friend} [came along|helped {him} look]. They looked {spot2} and all around.

At last they heard [a soft call|someone calling]. It was the mother! The baby {animal} [ran to
her|squeaked with joy]. "[Thank you for bringing my baby home|You have a good heart]," [said the
mother|the mother said]. {hero} was a little sad and very {glad}. [{moral} to do what is
right.|Every {often} after that, the baby came to play with {him}.|]""",
    "a kite in the wind": """
{one_day} {hero} and {friend} [made|built] a {color} kite[ out of paper and sticks|]. They
[ran|went] to {place} to fly it. A [strong|fresh|good] wind was blowing. Up went the kite, higher
than the [trees|roofs|birds]! "[Let me hold it|It is my turn]," said {friend}. "No, [it is mine|I
want to hold it]," said {hero}. They both [pulled|pulled hard], and snap! The string broke. The wind
took the kite away.

"[That is your fault|Look what you did]!" [shouted|cried] {hero}. {friend} [turned away|began to
cry]. They [sat back to back|did not speak] for a long time. Then {hero} [saw a tear on {friend}'s
face|thought of all the fun they had had]. "I am sorry," {he} said. "I [should have taken turns|was
not fair]." "I am sorry too," said {friend}. "[Let us look for it|Come, we will find it together]."

They [walked|searched] [past the barn|over the hill|along the stream] and asked a {animal}. The kite
was {spot}, with a [big|small|round] hole in it. [They mended it with a piece of {color2}
cloth.|{his_adult} helped them to mend it.] Now they took turns: first {friend}, then {hero}. [The
kite flew better than before.|Nobody pulled.] [{moral} to take turns.|They were both {glad}.|]""",
}
"""What happens in a story, by subject."""

// Azurite's blob service with the arguments after its path; it ends when its standard input does.
process.stdin.on("end", () => process.exit(0)).resume();
require(process.argv.splice(2, 1)[0]);

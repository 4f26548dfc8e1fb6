// Runs Azurite's blob service: serve_azurite.js PROGRAM CONTAINER KEY [Azurite's arguments]. Creates the container, prints
// "ready", and ends when its standard input closes.
const crypto = require("crypto");

const [program, container, key] = process.argv.splice(2, 3);
const argument = (name) => process.argv[process.argv.indexOf(name) + 1];
const url = `http://${argument("--blobHost")}:${argument("--blobPort")}/devstoreaccount1/${container}?restype=container`;

function makeContainer() {
  const headers = { "x-ms-date": new Date().toUTCString(), "x-ms-version": "2021-08-06" };
  const signed = Object.entries(headers).map(([name, value]) => `${name}:${value}\n`).join("");
  const text = `PUT${"\n".repeat(12)}${signed}/devstoreaccount1/devstoreaccount1/${container}\nrestype:container`;
  const signature = crypto.createHmac("sha256", Buffer.from(key, "base64")).update(text).digest("base64");
  headers.authorization = `SharedKey devstoreaccount1:${signature}`;
  return fetch(url, { method: "PUT", headers });
}

async function announce() {
  for (let tries = 0; tries < 600; tries++) {
    const answer = await makeContainer().catch(() => null);
    if (answer) return process.stdout.write(answer.ok ? "ready\n" : `${answer.status} ${await answer.text()}\n`);
    await new Promise((later) => setTimeout(later, 100));
  }
  process.stdout.write("no answer\n");
}

process.stdin.on("end", () => process.exit(0)).resume();
// The service's own output goes elsewhere.
console.log = console.error;
require(program);
announce();
